// Paints a matrix of layers × steps onto a canvas by the logarithm of its values. Knows no page and asks nobody.

// Anchors of a perceptual ramp without the two colours that mean frozen and trained.
const RAMP = [[38, 24, 66], [73, 41, 121], [99, 68, 160], [104, 109, 180], [92, 152, 176], [98, 190, 154], [156, 220, 116], [238, 240, 120]];
const DECADES = 6; // at most: one denormal must not flatten everything else
const BAD = 0xff2a2ad0; // red, as a little-endian pixel

export function color(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[low].map((c, i) => Math.round(c + (RAMP[low + 1][i] - c) * (at - low)));
}
const TABLE = Uint32Array.from({ length: 256 }, (_, i) => {
  const [r, g, b] = color(i / 255);
  return (255 << 24) | (b << 16) | (g << 8) | r;
});

// A matrix from {layers, steps} and its rows one after the other: NaN where there is no value, -1 for no number.
// Levels are log10 of a value; NaN where there is none, +Infinity where it is no number, -Infinity for zero.
export function toMatrix({ layers, steps }, floats) {
  const levels = new Float32Array(floats.length);
  for (let i = 0; i < floats.length; i++) levels[i] = floats[i] === -1 ? Infinity : Math.log10(floats[i]);
  return { layers, steps, rows: layers.map((_, y) => levels.subarray(y * steps.length, (y + 1) * steps.length)) };
}

// What came since is put behind; both have the same layers.
export function join(matrix, more) {
  const rows = matrix.rows.map((row, i) => {
    const longer = new Float32Array(row.length + more.rows[i].length);
    longer.set(row);
    longer.set(more.rows[i], row.length);
    return longer;
  });
  return { layers: matrix.layers, steps: [...matrix.steps, ...more.steps], rows };
}

// Where the colours begin and end, in powers of ten, and whether a value is no number.
export function measure(matrix) {
  let [low, high, lost] = [Infinity, -Infinity, false];
  for (const row of matrix.rows) {
    for (const level of row) {
      if (level === Infinity) lost = true;
      else if (level > -Infinity) {
        if (level < low) low = level;
        if (level > high) high = level;
      }
    }
  }
  if (high === -Infinity) return { low: 0, high: 1, lost };
  low = Math.max(low, high - DECADES);
  return high - low < 1e-6 ? { low: low - 0.5, high: high + 0.5, lost } : { low, high, lost };
}

// The pixels of layers `top` to `bottom` and of steps `from` to `to`, `width` × `height` of them. Where several cells
// share a pixel the largest stays, so that a spike of one step shows; a pixel without any value stays transparent.
export function paint(matrix, range, { from, to, top, bottom, width, height }) {
  const { steps, rows } = matrix;
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const scale = width / Math.max(1, to - from);
  // The first pixel of each step: it reaches to the first of the next.
  const starts = Int32Array.from(steps, (step) => Math.floor((step - from) * scale));
  const ends = Int32Array.from(steps, (step, i) => Math.max(starts[i] + 1, Math.floor(((steps[i + 1] ?? Math.max(to, step + 1)) - from) * scale)));
  const best = new Float32Array(width);
  const lines = Math.min(height, bottom - top);
  for (let line = 0; line < lines; line++) {
    best.fill(NaN);
    const first = top + Math.floor((line * (bottom - top)) / lines);
    const last = Math.max(first + 1, top + Math.floor(((line + 1) * (bottom - top)) / lines));
    for (let y = first; y < last; y++) {
      const row = rows[y];
      for (let i = 0; i < row.length; i++) {
        const level = row[i];
        if (level !== level || ends[i] <= 0 || starts[i] >= width) continue;
        for (let x = Math.max(0, starts[i]); x < ends[i] && x < width; x++) if (!(best[x] >= level)) best[x] = level;
      }
    }
    const up = Math.floor((line * height) / lines);
    const down = Math.floor(((line + 1) * height) / lines);
    const factor = 255 / (range.high - range.low);
    const at = up * width;
    for (let x = 0; x < width; x++) {
      const level = best[x];
      if (level !== level) continue;
      pixels[at + x] = level === Infinity ? BAD : TABLE[Math.max(0, Math.min(255, Math.round((level - range.low) * factor)))];
    }
    for (let y = up + 1; y < down; y++) pixels.copyWithin(y * width, at, at + width);
  }
  return image;
}
