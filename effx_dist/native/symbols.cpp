// Symbols to bitmask and nibble pairs and back (effx_dist/codecs/symbols.py), table look-ups, residuals
// added in place, and byte planes (effx_dist/codecs/planes.py).
//
// Payloads come from files that may be hostile: every index that comes from one is checked here,
// whatever the caller has checked before. A function that finds one out of bounds returns -1.

#include <cstdint>

#include "bits.h"
#include "floats.h"

namespace {

using namespace effx;

constexpr int64_t kLarge = 15;
constexpr int64_t kDamaged = -1;

// The non-zero symbols of one block, one after another: a nibble each, and the large ones apart. Each
// comes out as its entry in a table of 256, of type V.
template <class V>
class Values {
 public:
  Values(const uint8_t* pairs, int64_t count, const uint8_t* large, int64_t num_large,
         const V* table)
      : pairs_(pairs), count_(count), large_(large), num_large_(num_large), table_(table) {
    for (int byte = 0; byte < 256; ++byte) {
      of_pair_[byte][0] = table[1 + (byte & 15)];
      of_pair_[byte][1] = table[1 + (byte >> 4)];
    }
  }

  // The next n <= kChunk, which stay until the next call; null where there are not so many. A large
  // symbol's entry goes through replace(symbol, &entry), which says whether all is well.
  template <class Replace>
  const V* next(int64_t n, Replace replace) {
    if (n > count_ - position_) return nullptr;
    const uint8_t* pairs = pairs_ + position_ / 2;
    const int64_t first = position_ % 2, num_pairs = (first + n + 1) / 2;
    for (int64_t i = 0; i < num_pairs; ++i) std::memcpy(out_ + 2 * i, of_pair_[pairs[i]], 2 * sizeof(V));
    if (num_large_ > 0) {
      for (int64_t i = 0; i < num_pairs; ++i)
        is_large_[i] = ((pairs[i] & 15) == kLarge) | (pairs[i] >> 4 == kLarge);
      bool is_well = true;
      for_each_nonzero(is_large_, num_pairs, [&](int64_t i) {
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t at = 2 * i + half;
          if ((pairs[i] >> (4 * half) & 15) != kLarge || at < first || at >= first + n) continue;
          if (!(is_well = is_well && large_position_ < num_large_)) return;
          const uint8_t symbol = large_[large_position_++];
          out_[at] = table_[symbol];
          is_well = replace(symbol, &out_[at]);
        }
      });
      if (!is_well) return nullptr;
    }
    position_ += n;
    return out_ + first;
  }

 private:
  const uint8_t* pairs_;
  int64_t count_;
  const uint8_t* large_;
  int64_t num_large_;
  const V* table_;
  int64_t position_ = 0, large_position_ = 0;
  V of_pair_[256][2];
  V out_[kChunk + 2 + kWord] = {};  // read beyond its end by whole vectors
  uint8_t is_large_[kChunk / 2 + 1];
};

inline int64_t count_mask(const uint8_t* mask, int64_t start, int64_t stop) {
  int64_t count = 0;
  for (; start < stop; start += kWord) count += __builtin_popcountll(mask_word(mask, start, stop));
  return count;
}

// dense[i] = the next of the values where bit i of the word is set, else 0. Returns those left.
inline const float* spread(uint64_t word, const float* values, float* dense) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < kWord; i += 16, word >>= 16) {
    const __mmask16 mask = __mmask16(word);
    _mm512_storeu_ps(dense + i, _mm512_maskz_expand_ps(mask, _mm512_loadu_ps(values)));
    values += __builtin_popcount(mask);
  }
#else
  std::memset(dense, 0, kWord * sizeof(float));
  for (; word; word &= word - 1) dense[__builtin_ctzll(word)] = *values++;
#endif
  return values;
}

// values[i] += table[symbol of i], rounded to the values' type once. Adding the 0 of all others counts:
// it makes -0 to 0.
template <class T>
int64_t add_values(T* values, int64_t n, const uint8_t* mask, Values<float>& symbols, int64_t escape,
                   const float* escapes, int64_t num_escapes) {
  int64_t escape_position = 0;
  const auto replace = [&](int64_t symbol, float* residual) {
    if (symbol != escape) return true;
    if (escape_position >= num_escapes) return false;
    *residual = escapes[escape_position++];
    return true;
  };
  float dense[kWord];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t stop = std::min(start + kChunk, n);
    const float* residuals = symbols.next(count_mask(mask, start, stop), replace);
    if (!residuals) return kDamaged;
    for (int64_t at = start; at < stop; at += kWord) {
      residuals = spread(mask_word(mask, at, stop), residuals, dense);
      const int64_t size = std::min(kWord, stop - at);
      for (int64_t i = 0; i < size; ++i) store(values + at + i, load(values + at + i) + dense[i]);
    }
  }
  return n;
}

template <class Word>
void split(const Word* words, int64_t n, uint8_t* planes) {
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t stop = std::min(start + kChunk, n);
    for (size_t plane = 0; plane < sizeof(Word); ++plane) {
      uint8_t* out = planes + int64_t(plane) * n;
      for (int64_t i = start; i < stop; ++i) out[i] = uint8_t(words[i] >> (8 * plane));
    }
  }
}

template <class Word>
void merge(const uint8_t* const* planes, int64_t n, Word* words) {
  Word merged[kChunk];
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t size = std::min(kChunk, n - start);
    for (int64_t i = 0; i < size; ++i) merged[i] = planes[0][start + i];
    for (size_t plane = 1; plane < sizeof(Word); ++plane) {
      const uint8_t* from = planes[plane] + start;
      for (int64_t i = 0; i < size; ++i) merged[i] = Word(merged[i] | Word(from[i]) << (8 * plane));
    }
    std::memcpy(words + start, merged, size_t(size) * sizeof(Word));
  }
}

// Differences modulo the words' width, small ones of either sign to small numbers: 0, -1, 1, -2, ...
template <class Word>
void delta(const Word* words, const Word* reference, int64_t n, Word* out) {
  constexpr int kSign = 8 * sizeof(Word) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const Word difference = Word(words[i] - reference[i]);
    const Word negative = Word(-Word(difference >> kSign));
    out[i] = Word(Word(difference << 1) ^ negative);
  }
}

template <class Word>
void undo_delta(const Word* folded, int64_t n, Word* words) {
  for (int64_t i = 0; i < n; ++i)
    words[i] = Word(words[i] + Word(Word(folded[i] >> 1) ^ Word(-Word(folded[i] & 1))));
}

// Calls run with a word of this many bytes.
template <class Run>
int64_t with_word(int64_t item_bytes, int64_t n, Run run) {
  switch (item_bytes) {
    case 1: run(uint8_t(0)); return n;
    case 2: run(uint16_t(0)); return n;
    case 4: run(uint32_t(0)); return n;
    case 8: run(uint64_t(0)); return n;
    default: return kDamaged;
  }
}

}  // namespace

extern "C" {

// mask: a bit for each symbol; values: those that are not 0 [n + 64]. Returns how many.
int64_t effx_split_symbols(const uint8_t* symbols, int64_t n, uint8_t* mask, uint8_t* values) {
  int64_t count = 0;
  for (int64_t start = 0; start < n; start += kWord) {
    const int64_t size = std::min(kWord, n - start);
    uint64_t word = nonzero_bits(symbols + start, size);
    std::memcpy(mask + start / 8, &word, size_t((size + 7) / 8));
    for (; word; word &= word - 1) values[count++] = symbols[start + __builtin_ctzll(word)];
  }
  return count;
}

// Nibbles of non-zero symbols, two a byte [(n + 1) / 2]; large: those above 15 [n]. Returns how many.
int64_t effx_pair_nibbles(const uint8_t* values, int64_t n, uint8_t* pairs, uint8_t* large) {
  for (int64_t i = 0; i < n / 2; ++i) {
    const uint8_t low = std::min<uint8_t>(uint8_t(values[2 * i] - 1), kLarge);
    const uint8_t high = std::min<uint8_t>(uint8_t(values[2 * i + 1] - 1), kLarge);
    pairs[i] = uint8_t(low | high << 4);
  }
  if (n % 2) pairs[n / 2] = std::min<uint8_t>(uint8_t(values[n - 1] - 1), kLarge);
  int64_t count = 0;
  for (int64_t start = 0; start < n; start += kWord) {
    const int64_t size = std::min(kWord, n - start);
    uint8_t is_large[kWord] = {};
    for (int64_t i = 0; i < size; ++i) is_large[i] = values[start + i] > kLarge;
    for_each_nonzero(is_large, size, [&](int64_t i) { large[count++] = values[start + i]; });
  }
  return count;
}

// The symbols where support is not 0 [n]. Returns how many, or -1 where another one is not 0.
int64_t effx_take_inside(const uint8_t* symbols, const uint8_t* support, int64_t n, uint8_t* out) {
  uint8_t outside = 0;
  for (int64_t i = 0; i < n; ++i) outside |= support[i] ? 0 : symbols[i];
  if (outside) return kDamaged;
  int64_t count = 0;
  for_each_nonzero(support, n, [&](int64_t i) { out[count++] = symbols[i]; });
  return count;
}

// The way back: values go where support is not 0, 0 elsewhere. Returns how many; -1 for too few values.
int64_t effx_put_inside(const uint8_t* values, int64_t num_values, const uint8_t* support, int64_t n,
                        uint8_t* out) {
  int64_t count = 0;
  std::memset(out, 0, size_t(n));
  for_each_nonzero(support, n, [&](int64_t i) {
    if (count < num_values) out[i] = values[count];
    ++count;
  });
  return count <= num_values ? count : kDamaged;
}

// How many bits are set.
int64_t effx_count_bits(const uint8_t* mask, int64_t num_bytes) {
  int64_t count = 0;
  for (int64_t start = 0; start < num_bytes; start += 8)
    count += __builtin_popcountll(mask_word(mask, 8 * start, 8 * num_bytes));
  return count;
}

// How many of the first n nibbles are 15.
int64_t effx_count_large(const uint8_t* pairs, int64_t n) {
  int64_t count = 0;
  for (int64_t i = 0; i < n / 2; ++i) count += (pairs[i] >= 0xf0) + ((pairs[i] & 15) == 15);
  return n % 2 ? count + ((pairs[n / 2] & 15) == 15) : count;
}

// Symbols from nibble pairs, at the bits of the mask (one after another where it is null), 0 elsewhere.
int64_t effx_join_symbols(const uint8_t* mask, int64_t n, const uint8_t* pairs, int64_t num_values,
                          const uint8_t* large, int64_t num_large, uint8_t* out) {
  uint8_t same[256];
  for (int i = 0; i < 256; ++i) same[i] = uint8_t(i);
  Values<uint8_t> values(pairs, num_values, large, num_large, same);
  const auto keep = [](int64_t, uint8_t*) { return true; };
  if (mask) std::memset(out, 0, size_t(n));
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t stop = std::min(start + kChunk, n);
    const int64_t count = mask ? count_mask(mask, start, stop) : stop - start;
    const uint8_t* from = values.next(count, keep);
    if (!from) return kDamaged;
    if (!mask) std::memcpy(out + start, from, size_t(count));
    for (int64_t at = start; mask && at < stop; at += kWord)
      for (uint64_t word = mask_word(mask, at, stop); word; word &= word - 1)
        out[at + __builtin_ctzll(word)] = *from++;
  }
  return n;
}

// out[i] = table[symbols[i]]; nothing is written where a symbol is not in the table.
int64_t effx_take_table(const float* table, int64_t length, const uint8_t* symbols, int64_t n,
                        float* out) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, symbols[i]);
  if (n > 0 && largest >= length) return kDamaged;
  for (int64_t i = 0; i < n; ++i) out[i] = table[symbols[i]];
  return n;
}

// values += table[symbols] in place; type 0: float, 1: half, 2: bfloat16. The table has 256 entries.
// After -1 the values are partly done.
int64_t effx_add_symbols(void* values, int64_t type, int64_t n, const uint8_t* mask,
                         const uint8_t* pairs, int64_t num_values, const uint8_t* large,
                         int64_t num_large, const float* table, int64_t escape, const float* escapes,
                         int64_t num_escapes) {
  Values<float> symbols(pairs, num_values, large, num_large, table);
  const auto add = [&](auto* typed) {
    return add_values(typed, n, mask, symbols, escape, escapes, num_escapes);
  };
  switch (type) {
    case 0: return add(static_cast<float*>(values));
    case 1: return add(static_cast<Float16*>(values));
    case 2: return add(static_cast<BFloat16*>(values));
    default: return kDamaged;
  }
}

// Bytes of equal position of n words: planes [item_bytes][n].
int64_t effx_split_planes(const void* words, int64_t item_bytes, int64_t n, uint8_t* planes) {
  return with_word(item_bytes, n, [&](auto zero) {
    split(static_cast<const decltype(zero)*>(words), n, planes);
  });
}

// The way back.
int64_t effx_merge_planes(const uint8_t* const* planes, int64_t item_bytes, int64_t n, void* words) {
  return with_word(item_bytes, n, [&](auto zero) {
    merge(planes, n, static_cast<decltype(zero)*>(words));
  });
}

// Folded differences of n words to a reference.
int64_t effx_delta(const void* words, const void* reference, int64_t item_bytes, int64_t n, void* out) {
  return with_word(item_bytes, n, [&](auto zero) {
    using Word = decltype(zero);
    delta(static_cast<const Word*>(words), static_cast<const Word*>(reference), n,
          static_cast<Word*>(out));
  });
}

// The way back: the reference, in words, becomes what was encoded.
int64_t effx_undo_delta(const void* folded, int64_t item_bytes, int64_t n, void* words) {
  return with_word(item_bytes, n, [&](auto zero) {
    using Word = decltype(zero);
    undo_delta(static_cast<const Word*>(folded), n, static_cast<Word*>(words));
  });
}

}  // extern "C"
