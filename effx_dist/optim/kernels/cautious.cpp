// The two walks of the cautious step for the CPU, over lists of pieces, with OpenMP.
//
// Built and called by compiled.py; the same arithmetic in torch operations stands in
// effx_dist/core/update_rules.py, and both give the same bits. That rests on three things: every
// operation rounds once (-ffp-contract=off forbids fused multiply-adds), sqrt and / are those of
// IEEE 754, and coefficients are rounded from double once. No operation looks at a neighbour, so
// neither threads nor the place where a shard is cut change a bit.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "floats.h"

namespace {

using namespace effx;

// One segment of one parameter. compiled.py fills a table of these, 10 int64 each.
struct Piece {
  void* param;
  const void* grad;
  void* first;   // exp_avg, momentum_buffer
  void* second;  // exp_avg_sq, or null
  int64_t numel;
  int64_t row;   // of the coefficients
  int64_t slot;  // of the counts and scales
  int64_t param_type;
  int64_t grad_type;
  int64_t decays_cautiously;
};

enum Type : int64_t { kFloat32, kFloat64, kFloat16, kBFloat16 };
enum RuleId : int64_t { kAdamW, kLion, kSGD, kNesterov };

// A row of coefficients: those that every rule has, then the rule's own.
constexpr int64_t kColumns = 10;
enum Column { kLr, kDecay, kGradFactor, kFirstOwn };

constexpr int64_t kElementsPerThread = 1 << 14;  // fewer are not worth waking a thread for
constexpr int64_t kElementsPerCount = 1 << 20;   // a vector's int32 lanes do not overflow
constexpr int64_t kElementsPerStretch = 1 << 18;

// Signs are compared, not the product, which underflows; NaN agrees with nothing.
template <class T>
inline bool agree(T update, T grad) {
  return ((update > 0) & (grad > 0)) | ((update < 0) & (grad < 0));
}
template <class T>
inline bool not_opposed(T update, T param) {
  return ((update >= 0) & (param >= 0)) | ((update <= 0) & (param <= 0));
}

// What a rule makes of one element: the new moments, and the update with its exact signs, which
// the update itself may lose where it underflows.
template <class T>
struct Advanced {
  T first, second, update, signs;
};

// A rule says what its update is: `signs` for the first walk, `advance` for the second.
template <class T>
struct AdamW {
  static constexpr bool kHasSecond = true;
  T beta1, rest1, beta2, rest2, inverse_correction, inverse_root_correction, eps;

  explicit AdamW(const double* own)
      : beta1(T(own[0])), rest1(T(own[1])), beta2(T(own[2])), rest2(T(own[3])),
        inverse_correction(T(own[4])), inverse_root_correction(T(own[5])), eps(T(own[6])) {}

  inline T signs(T grad, T first) const { return first * beta1 + grad * rest1; }

  inline Advanced<T> advance(T grad, T first, T second) const {
    const T m = signs(grad, first);
    const T v = second * beta2 + (grad * grad) * rest2;
    const T update = (m * inverse_correction) / (std::sqrt(v) * inverse_root_correction + eps);
    return {m, v, update, m};
  }
};

template <class T>
struct Lion {
  static constexpr bool kHasSecond = false;
  T beta1, rest1, beta2, rest2;

  explicit Lion(const double* own)
      : beta1(T(own[0])), rest1(T(own[1])), beta2(T(own[2])), rest2(T(own[3])) {}

  inline T signs(T grad, T first) const { return first * beta1 + grad * rest1; }

  inline Advanced<T> advance(T grad, T first, T) const {
    const T mixed = signs(grad, first);
    const T sign = mixed > 0 ? T(1) : mixed < 0 ? T(-1) : T(0);
    return {first * beta2 + grad * rest2, T(0), mixed != mixed ? mixed : sign, mixed};
  }
};

template <class T>
struct SGD {
  static constexpr bool kHasSecond = false;
  T momentum;

  explicit SGD(const double* own) : momentum(T(own[0])) {}

  inline T signs(T grad, T first) const { return first * momentum + grad; }

  inline Advanced<T> advance(T grad, T first, T) const {
    const T buffer = first * momentum + grad;
    return {buffer, T(0), buffer, buffer};
  }
};

template <class T>
struct Nesterov {
  static constexpr bool kHasSecond = false;
  T momentum;

  explicit Nesterov(const double* own) : momentum(T(own[0])) {}

  inline T signs(T grad, T first) const {
    return (first * momentum + grad) * momentum + grad;
  }

  inline Advanced<T> advance(T grad, T first, T) const {
    const T buffer = first * momentum + grad;
    const T update = buffer * momentum + grad;
    return {buffer, T(0), update, update};
  }
};

template <class T, template <class> class Rule, class G>
int64_t count_range(const Piece& piece, const double* row, int64_t begin, int64_t end) {
  const Rule<T> rule(row + kFirstOwn);
  const T factor = T(row[kGradFactor]);
  const G* __restrict grad = static_cast<const G*>(piece.grad);
  const T* __restrict first = static_cast<const T*>(piece.first);
  int64_t total = 0;
  for (int64_t block = begin; block < end; block += kElementsPerCount) {
    const int64_t block_end = std::min(end, block + kElementsPerCount);
    int32_t count = 0;
    for (int64_t i = block; i < block_end; ++i) {
      const T g = T(load(grad + i)) * factor;
      count += agree(rule.signs(g, first[i]), g);
    }
    total += count;
  }
  return total;
}

// Pointers are parameters: in a lambda their __restrict is lost, and the loop is not vectorised.
template <bool cautious_decay, class T, class Rule, class P, class G>
void update_elements(const Rule rule, T factor, T decay, T step_size, P* __restrict param,
                     const G* __restrict grad, T* __restrict first, T* __restrict second,
                     int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) {
    const T g = T(load(grad + i)) * factor;
    const T p = load(param + i);
    const auto next = rule.advance(g, first[i], Rule::kHasSecond ? second[i] : T(0));
    first[i] = next.first;
    if (Rule::kHasSecond) second[i] = next.second;
    const T decayed = cautious_decay && !not_opposed(next.signs, p) ? p : p * decay;
    // multiplied, not selected: a NaN or an infinity reaches the parameter as it does in AdamW
    const T mask = agree(next.signs, g) ? T(1) : T(0);
    store(param + i, decayed - (next.update * mask) * step_size);
  }
}

template <class T, template <class> class Rule, class P, class G>
void update_range(const Piece& piece, const double* row, double scale, int64_t begin, int64_t end) {
  const Rule<T> rule(row + kFirstOwn);
  const T factor = T(row[kGradFactor]), decay = T(row[kDecay]);
  const T step_size = T(scale * row[kLr]);
  P* param = static_cast<P*>(piece.param) + begin;
  const G* grad = static_cast<const G*>(piece.grad) + begin;
  T* first = static_cast<T*>(piece.first) + begin;
  T* second = Rule<T>::kHasSecond ? static_cast<T*>(piece.second) + begin : nullptr;
  if (piece.decays_cautiously) {
    update_elements<true>(rule, factor, decay, step_size, param, grad, first, second, end - begin);
  } else {
    update_elements<false>(rule, factor, decay, step_size, param, grad, first, second, end - begin);
  }
}

// Calls body(pointer of the gradient's type); a float64 parameter has float64 gradients.
template <class Body>
void with_grad_type(int64_t type, Body body) {
  if (type == kFloat32) body(static_cast<float*>(nullptr));
  if (type == kFloat16) body(static_cast<Float16*>(nullptr));
  if (type == kBFloat16) body(static_cast<BFloat16*>(nullptr));
}

template <template <class> class Rule>
int64_t count_part(const Piece& piece, const double* rows, int64_t begin, int64_t end) {
  const double* row = rows + piece.row * kColumns;
  if (piece.param_type == kFloat64) return count_range<double, Rule, double>(piece, row, begin, end);
  int64_t count = 0;
  with_grad_type(piece.grad_type, [&](auto* grad) {
    using G = std::remove_pointer_t<decltype(grad)>;
    count = count_range<float, Rule, G>(piece, row, begin, end);
  });
  return count;
}

// From the end to the beginning: what the first walk has read last may still be in a cache.
template <template <class> class Rule>
void update_part(const Piece& piece, const double* rows, double scale, int64_t begin, int64_t end) {
  const double* row = rows + piece.row * kColumns;
  for (int64_t stop = end; stop > begin; stop -= kElementsPerStretch) {
    const int64_t start = std::max(begin, stop - kElementsPerStretch);
    if (piece.param_type == kFloat64) {
      update_range<double, Rule, double, double>(piece, row, scale, start, stop);
      continue;
    }
    with_grad_type(piece.grad_type, [&](auto* grad) {
      using G = std::remove_pointer_t<decltype(grad)>;
      if (piece.param_type == kFloat32) update_range<float, Rule, float, G>(piece, row, scale, start, stop);
      if (piece.param_type == kFloat16) update_range<float, Rule, Float16, G>(piece, row, scale, start, stop);
      if (piece.param_type == kBFloat16) update_range<float, Rule, BFloat16, G>(piece, row, scale, start, stop);
    });
  }
}

struct Part {
  int64_t begin, end;
};

// Thread `which`'s share of elements [0, numel).
inline Part share_of(int64_t numel, int64_t num_threads, int64_t which) {
  const int64_t each = numel / num_threads;
  return {each * which, which + 1 == num_threads ? numel : each * (which + 1)};
}

// The part of piece i, which starts after `start` elements of all, that lies in `share`.
inline Part within(const Piece& piece, int64_t start, Part share) {
  return {std::max<int64_t>(share.begin - start, 0), std::min(share.end - start, piece.numel)};
}

int threads_for(int64_t total, int64_t max_threads) {
  return int(std::min(max_threads, std::max<int64_t>(1, total / kElementsPerThread)));
}

int64_t total_of(const Piece* pieces, int64_t num) {
  int64_t total = 0;
  for (int64_t i = 0; i < num; ++i) total += pieces[i].numel;
  return total;
}

template <template <class> class Rule>
void count_all(const Piece* pieces, int64_t num, const double* rows, int64_t* counts, int64_t max_threads) {
  const int64_t total = total_of(pieces, num);
#pragma omp parallel num_threads(threads_for(total, max_threads))
  {
    const Part share = share_of(total, omp_get_num_threads(), omp_get_thread_num());
    int64_t start = 0;
    for (int64_t i = 0; i < num; start += pieces[i++].numel) {
      const Part part = within(pieces[i], start, share);
      if (part.begin >= part.end) continue;
      const int64_t count = count_part<Rule>(pieces[i], rows, part.begin, part.end);
#pragma omp atomic
      counts[pieces[i].slot] += count;
    }
  }
}

template <template <class> class Rule>
void update_all(const Piece* pieces, int64_t num, const double* rows, const double* scales, int64_t max_threads) {
  const int64_t total = total_of(pieces, num);
#pragma omp parallel num_threads(threads_for(total, max_threads))
  {
    const Part share = share_of(total, omp_get_num_threads(), omp_get_thread_num());
    int64_t start = total;
    for (int64_t i = num - 1; i >= 0; --i) {
      start -= pieces[i].numel;
      const Part part = within(pieces[i], start, share);
      if (part.begin < part.end) update_part<Rule>(pieces[i], rows, scales[pieces[i].slot], part.begin, part.end);
    }
  }
}

// Both walks, whole by whole, so that the second finds in a cache what the first has read.
template <template <class> class Rule>
void step_all(const Piece* pieces, int64_t num, const double* rows, int64_t* counts, double min_fraction, int64_t max_threads) {
#pragma omp parallel num_threads(threads_for(total_of(pieces, num), max_threads))
  {
    const int64_t num_threads = omp_get_num_threads(), which = omp_get_thread_num();
    for (int64_t i = 0; i < num; ++i) {
      const Piece& piece = pieces[i];
      const bool is_shared = piece.numel >= kElementsPerThread && num_threads > 1;
      if (!is_shared && i % num_threads != which) continue;
      const Part part = is_shared ? share_of(piece.numel, num_threads, which) : Part{0, piece.numel};
      const int64_t count = count_part<Rule>(piece, rows, part.begin, part.end);
#pragma omp atomic
      counts[piece.slot] += count;
      if (is_shared) {
#pragma omp barrier
      }
      const double fraction = double(counts[piece.slot]) / double(std::max<int64_t>(piece.numel, 1));
      update_part<Rule>(piece, rows, 1 / std::max(fraction, min_fraction), part.begin, part.end);
    }
  }
}

}  // namespace

// counts[slot] += agreeing elements. Writes nothing else.
extern "C" void effx_cautious_count(int64_t rule, const void* pieces, int64_t num_pieces, const double* rows,
                                    int64_t* counts, int64_t max_threads) {
  const Piece* table = static_cast<const Piece*>(pieces);
  if (rule == kAdamW) count_all<AdamW>(table, num_pieces, rows, counts, max_threads);
  if (rule == kLion) count_all<Lion>(table, num_pieces, rows, counts, max_threads);
  if (rule == kSGD) count_all<SGD>(table, num_pieces, rows, counts, max_threads);
  if (rule == kNesterov) count_all<Nesterov>(table, num_pieces, rows, counts, max_threads);
}

// Advances the moments and steps the parameters; scales[slot] = 1 / max(count / numel, min_fraction).
extern "C" void effx_cautious_update(int64_t rule, const void* pieces, int64_t num_pieces, const double* rows,
                                     const double* scales, int64_t max_threads) {
  const Piece* table = static_cast<const Piece*>(pieces);
  if (rule == kAdamW) update_all<AdamW>(table, num_pieces, rows, scales, max_threads);
  if (rule == kLion) update_all<Lion>(table, num_pieces, rows, scales, max_threads);
  if (rule == kSGD) update_all<SGD>(table, num_pieces, rows, scales, max_threads);
  if (rule == kNesterov) update_all<Nesterov>(table, num_pieces, rows, scales, max_threads);
}

// Both, for pieces that are whole parameters, each the only one of its slot; counts[slot] is 0 before.
extern "C" void effx_cautious_step(int64_t rule, const void* pieces, int64_t num_pieces, const double* rows,
                                   int64_t* counts, double min_fraction, int64_t max_threads) {
  const Piece* table = static_cast<const Piece*>(pieces);
  if (rule == kAdamW) step_all<AdamW>(table, num_pieces, rows, counts, min_fraction, max_threads);
  if (rule == kLion) step_all<Lion>(table, num_pieces, rows, counts, min_fraction, max_threads);
  if (rule == kSGD) step_all<SGD>(table, num_pieces, rows, counts, min_fraction, max_threads);
  if (rule == kNesterov) step_all<Nesterov>(table, num_pieces, rows, counts, min_fraction, max_threads);
}
