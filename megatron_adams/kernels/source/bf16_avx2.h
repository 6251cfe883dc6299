// A block of the host's step in AVX2 intrinsics. It serves the modes that write only bf16 numbers
// or the halves of fp32 main params.
//
// The arithmetic is element.h's, on eight numbers at a time. Two things are faster here than in
// what the compiler makes of the loops in host.cpp:
// - Sixteen results become bf16 together. One blend for each of their halves puts them in the order
//   of memory, and 16-bit lanes round them after that.
// - NaNs are not looked for one by one. If exp_avg becomes NaN, param does, too, so one check for
//   sixteen params is enough.
//
// On CPUs with AVX-512 the compiler has wider vectors, and the loops of host.cpp run instead.

// These names tell the preprocessor which dtypes the block below is for. Compiling <immintrin.h>
// takes most of a second, so only the modes that need it include it.
#define ADAMS_JOIN_NAMES(a, b) a##b
#define ADAMS_JOIN(a, b) ADAMS_JOIN_NAMES(a, b)
#define ADAMS_AVX2_GRAD_BF16 1
#define ADAMS_AVX2_GRAD_F32 1
#define ADAMS_AVX2_PARAM_BF16 1
#define ADAMS_AVX2_EXP_AVG_BF16 1
#define ADAMS_AVX2_MAIN_NoMain 1
#define ADAMS_AVX2_MAIN_Remainder 1

#if defined(__AVX2__) && !defined(__AVX512BW__) && !ADAMS_GUARDED &&                          \
    ADAMS_JOIN(ADAMS_AVX2_GRAD_, ADAMS_GRAD) && ADAMS_JOIN(ADAMS_AVX2_PARAM_, ADAMS_PARAM) && \
    ADAMS_JOIN(ADAMS_AVX2_EXP_AVG_, ADAMS_EXP_AVG) && ADAMS_JOIN(ADAMS_AVX2_MAIN_, ADAMS_MAIN)
#include <immintrin.h>

namespace adams {

constexpr bool fits_avx2 = true;

// Sixteen neighbouring elements, as fp32 numbers or as 32-bit words. Those with even indices are in
// one vector, those with odd indices in the other.
struct Sixteen {
    __m256 even, odd;
};

template <class Storage>  // of 16 or 32 bits
ADAMS_FUNCTION Sixteen read_16(const Storage* memory) {
    if constexpr (sizeof(Storage) == 4) {
        const float* const floats = reinterpret_cast<const float*>(memory);
        const __m256 first = _mm256_loadu_ps(floats), second = _mm256_loadu_ps(floats + 8);
        // The shuffles give 0 2 8 10 4 6 12 14. The permutations exchange the two pairs in the
        // middle.
        const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0x88));
        const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(first, second, 0xdd));
        return {_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)),
                _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8))};
    } else {
        const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(memory));
        const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(all, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(all, upper))};
    }
}
ADAMS_FUNCTION void write_16(void* memory, __m256i all) {
    _mm256_storeu_si256(static_cast<__m256i*>(memory), all);
}

// The upper and the lower halves of sixteen words, in the order of memory.
struct Halves {
    __m256i upper, lower;
};
ADAMS_FUNCTION Halves halves_of(Sixteen words) {
    const __m256i even = _mm256_castps_si256(words.even), odd = _mm256_castps_si256(words.odd);
    return {_mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa),
            _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa)};
}

// Rounds as BF16::encode does, but does not treat NaNs. An upper half is rounded up if its lower
// half is above 0x8000, or if it is 0x8000 and the upper half is odd. One test finds both cases:
// subtract 1 from the lower half if the upper half is even, and look at its highest bit.
ADAMS_FUNCTION __m256i encode_bf16(Sixteen x) {
    const Halves halves = halves_of(x);
    const __m256i is_even = _mm256_andnot_si256(halves.upper, _mm256_set1_epi16(1));
    const __m256i up = _mm256_srli_epi16(_mm256_subs_epu16(halves.lower, is_even), 15);
    return _mm256_add_epi16(halves.upper, up);
}

ADAMS_FUNCTION bool has_nan(Sixteen x) {
    return _mm256_movemask_ps(_mm256_cmp_ps(x.even, x.odd, _CMP_UNORD_Q)) != 0;
}
ADAMS_FUNCTION __m256 with_nans_as(__m256 x, int bits) {
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(bits));
    return _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}
ADAMS_FUNCTION Sixteen with_nans_as(Sixteen x, int bits) {
    return {with_nans_as(x.even, bits), with_nans_as(x.odd, bits)};
}

// These do on vectors what `join` and `Master` of element.h do on one number.
ADAMS_FUNCTION __m256 join(__m256 high, __m256 low) {
    const __m256i rest = _mm256_srai_epi32(_mm256_castps_si256(low), 16);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(high), rest));
}
ADAMS_FUNCTION Sixteen read_masters(const Param::Storage* param, const Main::Storage* main) {
    const Sixteen high = read_16(param);
    if constexpr (has_main) {
        const Sixteen low = read_16(main);
        return {join(high.even, low.even), join(high.odd, low.odd)};
    } else {
        return high;
    }
}
ADAMS_FUNCTION void write_masters(Param::Storage* param, Main::Storage* main, Sixteen masters) {
    if (has_main) {
        const Halves halves = halves_of(masters);
        write_16(param, _mm256_add_epi16(halves.upper, _mm256_srli_epi16(halves.lower, 15)));
        write_16(main, halves.lower);
    } else {
        write_16(param, encode_bf16(masters));
    }
}

ADAMS_FUNCTION __m256 divisor_of(__m256 v, const Scalars& s) { return _mm256_sqrt_ps(v) + s.eps; }

// Update COUNT elements in two loops, for the reason that host.cpp gives for its pairs.
template <int COUNT>
ADAMS_FUNCTION void update_block_avx2(const Grad::Storage* __restrict grad,
                                      Param::Storage* __restrict param,
                                      ExpAvg::Storage* __restrict exp_avg,
                                      Main::Storage* __restrict main, const Scalars& s) {
    Sixteen moved[COUNT / 16], numerators[COUNT / 16], divisors[COUNT / 16];
    for (int i = 0; i < COUNT; i += 16) {
        Sixteen p = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        if (s.decay == L2) p = read_masters(param + i, has_main ? main + i : main);
        const Sixteen g = read_16(grad + i);
        Sixteen m = read_16(exp_avg + i);
        divisors[i / 16].even = divisor_of(move_exp_avg(m.even, g.even, p.even, s), s);
        divisors[i / 16].odd = divisor_of(move_exp_avg(m.odd, g.odd, p.odd, s), s);
        moved[i / 16] = m;
        numerators[i / 16].even = numerator_of(m.even, g.even, p.even, s);
        numerators[i / 16].odd = numerator_of(m.odd, g.odd, p.odd, s);
        write_16(exp_avg + i, encode_bf16(m));
    }
    for (int i = 0; i < COUNT; i += 16) {
        Main::Storage* const main_i = has_main ? main + i : main;
        Sixteen p = read_masters(param + i, main_i);
        const Sixteen n = numerators[i / 16], divisor = divisors[i / 16];
        move_param(p.even, update_of(n.even, divisor.even, s), s);
        move_param(p.odd, update_of(n.odd, divisor.odd, s), s);
        if (__builtin_expect(has_nan(p), 0)) {
            write_16(exp_avg + i, encode_bf16(with_nans_as(moved[i / 16], 0x7fc00000)));
            p = with_nans_as(p, has_main ? 0x7fff0000 : 0x7fc00000);
        }
        write_masters(param + i, main_i, p);
    }
}

}  // namespace adams

#else

namespace adams {
constexpr bool fits_avx2 = false;
template <int COUNT>
void update_block_avx2(...);  // never called
}  // namespace adams

#endif
