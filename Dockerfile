# One image, one volume. CPU by default; for CUDA:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t frostline .
#   docker run --gpus all -p 127.0.0.1:8000:8000 -v frostline:/data frostline
FROM node:22-slim AS vendor
WORKDIR /build
COPY package.json package-lock.json ./
COPY static static
RUN npm ci --ignore-scripts --no-audit --no-fund && npm run --silent vendor

FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    FROSTLINE_DATA_DIR=/data
RUN useradd --create-home --uid 10001 frostline && install -d -o frostline /data
WORKDIR /srv/frostline
COPY requirements.lock pyproject.toml README.md ./
RUN grep '^torch==' requirements.lock > /tmp/torch.txt \
    && pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple -r /tmp/torch.txt \
    && pip install -r requirements.lock
COPY app app
COPY templates templates
COPY static static
COPY --from=vendor /build/static/vendor static/vendor
RUN pip install --no-deps --no-build-isolation --editable .
USER frostline
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s CMD \
    ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/api/health', timeout=2)"]
# Inside the container it must listen on every address; publish the port on loopback only (see above).
CMD ["frostline", "serve", "--host", "0.0.0.0", "--insecure-http", "--no-open"]
