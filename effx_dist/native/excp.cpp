// Statistics and symbols of the dead-zone quantisers: what effx_dist/core/excp says in numpy, with the
// same bits. That rests on three things: every floating point operation rounds once and is the one
// numpy does, sums are of integers, and no element's result depends on its neighbours.
//
// Built and called by excp.py, which checks types and lengths. No index comes from a value unchecked.

#include <cmath>
#include <cstdint>

#include "bits.h"
#include "floats.h"

namespace {

using namespace effx;

constexpr uint32_t kMagnitude = 0x7fffffff;
constexpr int kBinShift = 19;
constexpr int64_t kNumBins = int64_t(1) << (31 - kBinShift);
constexpr float kRounding = 0.4f;
constexpr int64_t kMaxCells = 129;  // levels 0 to 127, and one to spare

inline uint32_t magnitude_bits(float x) { return bit_cast<uint32_t>(x) & kMagnitude; }

// rint(x) for |x| <= 2^51, to the nearest and ties to even, from one addition: it vectorises.
inline int64_t rint_of(double x) {
  constexpr double kMagic = 0x1.8p52;
  return bit_cast<int64_t>(x + kMagic) - bit_cast<int64_t>(kMagic);
}

template <class Term>
inline int64_t sum_of(int64_t n, Term term) {
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += rint_of(term(i));
  return total;
}

// |r| in steps, clipped just above the cap, where NaN goes as well: levels index tables.
struct Grid {
  float step, cap;

  inline float steps(float r) const {
    const float s = std::fabs(r) / step;
    return s < cap ? s : cap;
  }
  static inline int32_t level(float steps) { return int32_t(steps + kRounding); }
};

// How many entries of an ascending table lie below x: np.searchsorted.
template <class T>
inline int64_t count_below(const T* table, int64_t length, T x) {
  const T* first = table;
  while (length > 0) {
    const int64_t half = length / 2;
    const bool below = first[half] < x;
    first += below ? half + 1 : 0;
    length = below ? length - half - 1 : half;
  }
  return first - table;
}

// Whether a moment is kept: 1 or 0 for each element, inside the kept weights.
inline void keep_moments(const uint8_t* kept_w, const float* m, const float* v, int64_t n,
                         float threshold, uint8_t* kept) {
  if (v) {
    for (int64_t i = 0; i < n; ++i)
      kept[i] = (kept_w[i] != 0) & (std::fabs(m[i]) > threshold) & (v[i] > 0);
  } else {
    for (int64_t i = 0; i < n; ++i) kept[i] = (kept_w[i] != 0) & (std::fabs(m[i]) > threshold);
  }
}

// Counts and sums of bit patterns over cells of 2^shift patterns: KeyCells of moments.py.
inline void add_key(uint32_t bits, uint32_t first, int shift, int64_t num_cells, int64_t* out) {
  const uint32_t offset = bits - (first << shift);
  const int64_t cell = std::min(int64_t(offset >> shift), num_cells - 1);
  out[cell] += 1;
  out[num_cells + cell] += offset;
}

}  // namespace

extern "C" {

// out: the largest magnitude's bits (above those of infinity where there is a NaN), and whether there
// is a value below 0.
void effx_range(const float* x, int64_t n, int64_t* out) {
  uint32_t largest = 0, negative = 0;
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, magnitude_bits(x[i]));
    negative |= uint32_t(bit_cast<uint32_t>(x[i]) > 0x80000000u);
  }
  out[0] = largest;
  out[1] = negative;
}

// Adds to out: counts of |r| by bin, then fixed point sums of r^2, |m| and v. m and v may be null.
void effx_sums(const float* r, const float* m, const float* v, int64_t n, const double* scales,
               int64_t* out) {
  static_assert(kNumBins == 4096, "the layout of statistics.py");
  uint32_t counts[2][kNumBins] = {};  // neighbours often share a bin: two tables do not wait
  const double square = scales[0], first = scales[1], second = scales[2];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t size = std::min(kChunk, n - start);
    const float* x = r + start;
    int64_t i = 0;
    for (; i + 1 < size; i += 2) {
      ++counts[0][magnitude_bits(x[i]) >> kBinShift];
      ++counts[1][magnitude_bits(x[i + 1]) >> kBinShift];
    }
    if (i < size) ++counts[0][magnitude_bits(x[i]) >> kBinShift];
    out[kNumBins] += sum_of(size, [=](int64_t j) { return double(x[j]) * double(x[j]) * square; });
  }
  for (int64_t bin = 0; bin < kNumBins; ++bin) out[bin] += int64_t(counts[0][bin]) + counts[1][bin];
  if (m) out[kNumBins + 1] += sum_of(n, [=](int64_t j) { return std::fabs(double(m[j])) * first; });
  if (v) out[kNumBins + 2] += sum_of(n, [=](int64_t j) { return double(v[j]) * second; });
}

// Adds to out: counts and sums of |r| by level, and the sum of squares of all but the escapes.
// kept: whether the symbol is not 0. max_level <= 126.
void effx_dead_zone_cells(const float* r, int64_t n, float step, int64_t max_level, double scale,
                          double squares_scale, int64_t* out, uint8_t* kept) {
  const Grid grid{step, float(max_level + 1)};
  const int64_t length = max_level + 2;
  int64_t counts[2][kMaxCells] = {}, sums[2][kMaxCells] = {}, squares = 0;
  float steps[kChunk];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t size = std::min(kChunk, n - start);
    uint8_t* levels = kept + start;  // levels until they have been counted
    for (int64_t i = 0; i < size; ++i) {
      steps[i] = grid.steps(r[start + i]);
      levels[i] = uint8_t(Grid::level(steps[i]));
    }
    for (int64_t i = 0; i < size; ++i) {
      const double inside = levels[i] <= max_level ? double(steps[i]) : 0.0;
      squares += rint_of(inside * inside * squares_scale);
    }
    int64_t num_kept = 0;
    for_each_nonzero(levels, size, [&](int64_t i) {
      const int64_t level = levels[i], table = num_kept++ & 1;
      ++counts[table][level];
      sums[table][level] += rint_of(double(steps[i]) * scale);
    });
    counts[0][0] += size - num_kept;
    for (int64_t i = 0; i < size; ++i) levels[i] = levels[i] != 0;
  }
  for (int64_t level = 0; level < length; ++level) {
    out[level] += counts[0][level] + counts[1][level];
    out[length + level] += sums[0][level] + sums[1][level];
  }
  out[2 * length] += squares;
}

// Adds to out: cells of kept m (by half octaves from `first`), cells of kept v (by octaves), the number
// kept, and the fixed point sum of kept v, which may be null.
void effx_moment_cells(const uint8_t* kept_w, const float* m, const float* v, int64_t n,
                       float threshold, int64_t first, int64_t num_m_cells, int64_t num_v_cells,
                       double v_scale, int64_t* out) {
  int64_t* v_cells = out + 2 * num_m_cells;
  int64_t* totals = v_cells + 2 * num_v_cells;
  uint8_t kept[kChunk];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t size = std::min(kChunk, n - start);
    const float* values = v ? v + start : nullptr;
    keep_moments(kept_w + start, m + start, values, size, threshold, kept);
    for_each_nonzero(kept, size, [&](int64_t i) {
      add_key(magnitude_bits(m[start + i]), uint32_t(first), 22, num_m_cells, out);
      ++totals[0];
      if (!values) return;
      add_key(magnitude_bits(values[i]), 0, 23, num_v_cells, v_cells);
      totals[1] += rint_of(double(values[i]) * v_scale);
    });
  }
}

// Symbols of residuals; returns how many are escapes. max_level <= 126.
int64_t effx_dead_zone_symbols(const float* r, int64_t n, float step, int64_t max_level,
                               uint8_t* symbols) {
  const Grid grid{step, float(max_level + 1)};
  const int32_t escape = int32_t(2 * max_level + 1);
  int32_t num_escapes = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t level = Grid::level(grid.steps(r[i]));
    const int32_t signed_level = 2 * level - 1 + int32_t(bit_cast<uint32_t>(r[i]) >> 31);
    const int32_t symbol = level == 0 ? 0 : std::min(signed_level, escape);
    symbols[i] = uint8_t(symbol);
    num_escapes += symbol == escape;
  }
  return num_escapes;
}

// Symbols of moments: 0 where pruned, else 1 + how many of the edges lie below. v may be null.
void effx_moment_symbols(const uint8_t* kept_w, const float* m, const float* v, int64_t n,
                         float threshold, const float* m_edges, int64_t num_m_edges,
                         const uint32_t* v_edges, int64_t num_v_edges, uint8_t* m_symbols,
                         uint8_t* v_symbols) {
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t size = std::min(kChunk, n - start);
    const float* values = v ? v + start : nullptr;
    uint8_t* kept = m_symbols + start;
    keep_moments(kept_w + start, m + start, values, size, threshold, kept);
    if (v) std::memcpy(v_symbols + start, kept, size_t(size));
    for_each_nonzero(kept, size, [&](int64_t i) {
      kept[i] = uint8_t(1 + count_below(m_edges, num_m_edges, m[start + i]));
      if (!values) return;
      const uint32_t key = magnitude_bits(values[i]);
      v_symbols[start + i] = uint8_t(1 + count_below(v_edges, num_v_edges, key));
    });
  }
}

}  // extern "C"
