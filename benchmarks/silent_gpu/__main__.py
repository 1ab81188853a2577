"""Runs a module on a GPU that computes nothing, but counts memory. Knows no model.

    python -m benchmarks.silent_gpu benchmarks.predict --bytes

torch runs all of its own code for CUDA and keeps its own accounts of memory; only the driver, the
CUDA runtime and cuBLAS under it are stood in for, by `runtime.c` and by functions that do nothing.
It needs a build of torch for CUDA 13, a C compiler, `nm`, and the headers of the package
nvidia-cuda-crt. cuDNN is switched off, since it needs a driver that answers. Numbers that are read
back from the GPU are zeros, and times mean nothing. SILENT_MAJOR and SILENT_MINOR name another
architecture than 9.0.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

INSIDE = "SILENT_GPU"  # names the folder of the stand-ins to the program that runs on them
SOURCE = Path(__file__).with_name("runtime.c")
LIBRARIES = Path(torch.__file__).parent / "lib"
RUNTIME = "runtime.so"
CONTEXT = "cuCtxGetCurrent"
HAS_CONTEXT = f"int {CONTEXT}(void **context) {{ *context = (void *)4096; return 0; }}\n"
HEADERS = Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "include"


def start(arguments: list[str]) -> None:
    """Start this program again on the stand-ins; does not return."""
    if torch.version.cuda is None or not (HEADERS / "crt").exists():
        sys.exit("It needs a torch that was built for CUDA 13, and the package nvidia-cuda-crt.")
    folder = Path(tempfile.mkdtemp(prefix="silent-gpu-"))
    try:
        _build(folder)
    except BaseException:
        shutil.rmtree(folder)
        raise
    surroundings = {
        "LD_PRELOAD": str(folder / RUNTIME),
        "LD_LIBRARY_PATH": str(folder),
        INSIDE: str(folder),
    }
    command = [sys.executable, "-m", "benchmarks.silent_gpu", *arguments]
    os.execve(sys.executable, command, os.environ | surroundings)


def _build(folder: Path) -> None:
    runtime, driver = folder / RUNTIME, folder / "libcuda.so.1"
    asked = set(re.findall(r"\bcu(?:da|blas)\w+", _symbols()))
    idle = _do_nothing(folder / "idle.c", asked - _defined(SOURCE.read_text()))
    _compile(runtime, SOURCE, idle, "-I", HEADERS)
    known = set(re.findall(r"\bcu[A-Z]\w+(?=\()", (HEADERS / "cuda.h").read_text()))
    every = known | {f"{name}_v{n}" for name in known for n in (2, 3)}
    _compile(driver, _do_nothing(folder / "driver.c", every - {CONTEXT}, HAS_CONTEXT))


def _symbols() -> str:
    """What torch asks of CUDA's libraries."""
    paths = [str(LIBRARIES / name) for name in ("libtorch_cuda.so", "libc10_cuda.so")]
    listed = ["nm", "-D", "--undefined-only", *paths]
    return subprocess.run(listed, check=True, capture_output=True, text=True).stdout


def _defined(source: str) -> set[str]:
    return set(re.findall(r"^(?:cudaError_t|int) (\w+)\(", source, re.MULTILINE))


def _do_nothing(path: Path, names: Iterable[str], more: str = "") -> Path:
    path.write_text(more + "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names)))
    return path


def _compile(made: Path, *options: str | Path) -> None:
    command = ["cc", "-w", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{made.name}", *options]
    subprocess.run([*command, "-o", made], check=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Name the module that is to run, for example benchmarks.predict.")
    folder = os.environ.pop(INSIDE, None)
    if folder is None:
        start(sys.argv[1:])
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    sys.argv = sys.argv[1:]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    finally:
        shutil.rmtree(folder)
