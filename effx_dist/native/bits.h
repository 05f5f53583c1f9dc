// Which of 64 bytes are not 0, and lists of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace effx {

constexpr int64_t kWord = 64;
constexpr int64_t kChunk = 4096;  // elements worked on at once: their temporaries stay in cache

// Bit i of the result: whether bytes[i] is not 0.
inline uint64_t nonzero_of_64(const uint8_t* bytes) {
#if defined(__AVX512BW__)
  const __m512i all = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(all, all);
#elif defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32));
  const uint64_t low_zeros = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, zero)));
  const uint64_t high_zeros = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, zero)));
  return ~(low_zeros | high_zeros << 32);
#else
  uint64_t found = 0;
  for (int i = 0; i < 64; ++i) found |= uint64_t(bytes[i] != 0) << i;
  return found;
#endif
}

// The same for `count` <= 64 bytes; the bits beyond are 0.
inline uint64_t nonzero_bits(const uint8_t* bytes, int64_t count) {
  if (count >= kWord) return nonzero_of_64(bytes);
  uint8_t padded[kWord] = {};
  std::memcpy(padded, bytes, size_t(count));
  return nonzero_of_64(padded);
}

// Calls visit(i) for each i < count where bytes[i] is not 0, ascending.
template <class Visit>
inline void for_each_nonzero(const uint8_t* bytes, int64_t count, Visit visit) {
  for (int64_t start = 0; start < count; start += kWord) {
    uint64_t word = nonzero_bits(bytes + start, count - start);
    for (; word; word &= word - 1) visit(start + __builtin_ctzll(word));
  }
}

// The up to 64 bits of a mask that belong to elements start, start + 1, ... below count; start is a
// multiple of 64, and no byte after those of `count` elements is read.
inline uint64_t mask_word(const uint8_t* mask, int64_t start, int64_t count) {
  const int64_t left = std::min(kWord, count - start);
  uint64_t word = 0;
  std::memcpy(&word, mask + start / 8, size_t((left + 7) / 8));
  return left < kWord ? word & ((uint64_t(1) << left) - 1) : word;
}

}  // namespace effx
