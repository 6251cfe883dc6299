// The AdamS step of one element, and the dtypes that it is read from and written to.
//
// NVRTC compiles it for a GPU, and g++ or clang++ for the host. It includes no header, so the CPU
// tests execute what a GPU executes. Every operation is rounded on its own: build with -fmad=false
// (NVRTC) or -ffp-contract=off (host). The operations have the order of megatron_adams/update.py.

#ifdef __CUDACC__
#define ADAMS_FUNCTION static __device__ __forceinline__
#else
#define ADAMS_FUNCTION static inline __attribute__((always_inline))
#endif

// Which dtypes a GPU converts with its own instructions (tuning.py: hardware_conversions).
#if defined(__CUDACC__) && ADAMS_HARDWARE_CONVERSIONS
#define ADAMS_CONVERTS_16_BITS 1
#define ADAMS_CONVERTS_8_BITS (__CUDA_ARCH__ >= 890)
#else
#define ADAMS_CONVERTS_16_BITS 0
#define ADAMS_CONVERTS_8_BITS 0
#endif

namespace adams {

#ifdef __CUDACC__
ADAMS_FUNCTION int bits_of(float x) { return __float_as_int(x); }
ADAMS_FUNCTION float float_of(int bits) { return __int_as_float(bits); }
ADAMS_FUNCTION float square_root(float x) { return __fsqrt_rn(x); }
ADAMS_FUNCTION void atomic_max(int* address, int value) { atomicMax(address, value); }
ADAMS_FUNCTION void atomic_add(long long* address, long long value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(address), (unsigned long long)value);
}
#else
ADAMS_FUNCTION int bits_of(float x) { return __builtin_bit_cast(int, x); }
ADAMS_FUNCTION float float_of(int bits) { return __builtin_bit_cast(float, bits); }
ADAMS_FUNCTION float square_root(float x) { return __builtin_sqrtf(x); }
ADAMS_FUNCTION void atomic_max(int* address, int value) {
    int seen = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (seen < value && !__atomic_compare_exchange_n(address, &seen, value, true,
                                                        __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
}
ADAMS_FUNCTION void atomic_add(long long* address, long long value) {
    __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
#endif

// |x| as an integer. Non-negative floats have the order of their bits, with NaN above infinity, so
// a maximum of magnitudes shows a NaN.
ADAMS_FUNCTION int magnitude(float x) { return bits_of(x) & 0x7fffffff; }
ADAMS_FUNCTION int larger(int a, int b) { return a > b ? a : b; }
ADAMS_FUNCTION int smaller(int a, int b) { return a < b ? a : b; }

// A stored number, in the upper bits of a 32-bit word. A loop over words of one width needs no
// conversions between vectors of different lengths. A codec expects the lower, unused bits of a
// word that it reads to be zero. It may leave anything in those of a word that it makes.
using Word = unsigned;
ADAMS_FUNCTION Word word_of(float stored) { return Word(bits_of(stored)); }
ADAMS_FUNCTION Word word_of(unsigned short stored) { return Word(stored) << 16; }
ADAMS_FUNCTION Word word_of(unsigned char stored) { return Word(stored) << 24; }
ADAMS_FUNCTION void write_word(float& memory, Word word) { memory = float_of(int(word)); }
ADAMS_FUNCTION void write_word(unsigned short& memory, Word word) {
    memory = (unsigned short)(word >> 16);
}
ADAMS_FUNCTION void write_word(unsigned char& memory, Word word) {
    memory = (unsigned char)(word >> 24);
}

struct F32 {
    using Storage = float;
    static constexpr bool is_fp8 = false;
    ADAMS_FUNCTION float decode(Word word) { return float_of(int(word)); }
    ADAMS_FUNCTION Word encode(float x) { return Word(bits_of(x)); }
};

struct BF16 {
    using Storage = unsigned short;
    static constexpr bool is_fp8 = false;
    ADAMS_FUNCTION float decode(Word word) { return float_of(int(word)); }
    ADAMS_FUNCTION Word encode(float x) {
#if ADAMS_CONVERTS_16_BITS
        unsigned short stored;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(stored) : "f"(x));
        return word_of(stored);
#else
        const Word bits = Word(bits_of(x));
        const Word rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
        return x != x ? 0x7fc00000u : rounded;
#endif
    }
};

// The GPU's own conversions, one number at a time. They round and saturate as the arithmetic below
// does.
#if ADAMS_CONVERTS_16_BITS
ADAMS_FUNCTION float to_float(unsigned short fp16) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(fp16));
    return x;
}
ADAMS_FUNCTION unsigned short to_fp16(float x) {
    unsigned short fp16;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(fp16) : "f"(x));
    return fp16;
}
#endif
#if ADAMS_CONVERTS_8_BITS
// The GPU converts fp8 in pairs. The second number of each pair is not used.
template <int MANTISSA>
ADAMS_FUNCTION unsigned short fp8_to_fp16(unsigned char fp8) {
    unsigned pair;
    if constexpr (MANTISSA == 3) {
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"((unsigned short)fp8));
    } else {
        asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(pair) : "h"((unsigned short)fp8));
    }
    return (unsigned short)pair;
}
template <int MANTISSA>
ADAMS_FUNCTION unsigned char to_fp8(float x) {
    unsigned short pair;
    if constexpr (MANTISSA == 3) {
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    } else {
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    }
    return (unsigned char)pair;
}
#endif

// A codec of floats with 1 + EXPONENT + MANTISSA bits, rounded to nearest even. A number that is
// too large becomes LIMIT: infinity, or the largest finite number of a dtype that saturates. A NaN
// becomes NAN_BITS. FIRST_SPECIAL is the lowest magnitude that is not finite: infinity, if the
// dtype has one. The code has no branches. It is right under flush-to-zero, because no result
// depends on a subnormal fp32 operand.
template <class StorageType, int EXPONENT, int MANTISSA, int LIMIT, int FIRST_SPECIAL, int NAN_BITS>
struct SmallFloat {
    using Storage = StorageType;
    static constexpr bool is_fp8 = sizeof(Storage) == 1;
    static constexpr int position = 31 - EXPONENT - MANTISSA;  // in a word
    static constexpr int bias = (1 << (EXPONENT - 1)) - 1;
    static constexpr int shift = 23 - MANTISSA;
    static constexpr int rebias = 127 - bias;

    ADAMS_FUNCTION float decode(Word word) {
#if ADAMS_CONVERTS_16_BITS
        if constexpr (sizeof(Storage) == 2) return to_float((unsigned short)(word >> 16));
#endif
#if ADAMS_CONVERTS_8_BITS
        if constexpr (is_fp8) return to_float(fp8_to_fp16<MANTISSA>((unsigned char)(word >> 24)));
#endif
        const int magnitude_bits = int((word & 0x7fffffffu) >> position);
        const int sign = int(word & 0x80000000u);
        const float unit = float_of((128 - bias - MANTISSA) << 23);  // the smallest subnormal
        const float subnormal = float(magnitude_bits) * unit;
        const int normal = (magnitude_bits << shift) + (rebias << 23);
        const int special = (magnitude_bits << shift) | 0x7f800000;
        const int finite = magnitude_bits < (1 << MANTISSA) ? bits_of(subnormal) : normal;
        return float_of((magnitude_bits >= FIRST_SPECIAL ? special : finite) | sign);
    }

    ADAMS_FUNCTION Word encode(float x) {
#if ADAMS_CONVERTS_16_BITS
        if constexpr (sizeof(Storage) == 2) return word_of(to_fp16(x));
#endif
#if ADAMS_CONVERTS_8_BITS
        if constexpr (is_fp8) return word_of(to_fp8<MANTISSA>(x));
#endif
        const int size = magnitude(x);
        const Word sign = Word(bits_of(x)) & 0x80000000u;
        // NaNs become infinity before the addition, which could overflow with a larger magnitude.
        const int finite = smaller(size, 0x7f800000);
        const int half = (1 << (shift - 1)) - 1 + ((finite >> shift) & 1);
        const int normal = ((finite + half) >> shift) - (rebias << MANTISSA);
        // Adding 2^23 times the smallest subnormal leaves the bits to be stored at the low end.
        const int magic = (128 - bias - MANTISSA + 23) << 23;
        const int subnormal = bits_of(float_of(finite) + float_of(magic)) - magic;
        const int rounded = finite < ((rebias + 1) << 23) ? subnormal : smaller(normal, LIMIT);
        return Word(size > 0x7f800000 ? NAN_BITS : rounded) << position | sign;
    }
};

using F16 = SmallFloat<unsigned short, 5, 10, 0x7c00, 0x7c00, 0x7e00>;
using E4M3 = SmallFloat<unsigned char, 4, 3, 0x7e, 0x7f, 0x7f>;
using E5M2 = SmallFloat<unsigned char, 5, 2, 0x7b, 0x7c, 0x7f>;

// The largest magnitude that state is scaled to, as the bits of an fp32 number; 0 if the dtype is
// not scaled.
template <class Codec>
constexpr int largest_scaled = 0;
template <>
constexpr int largest_scaled<F16> = 0x47000000;  // 2^15
template <>
constexpr int largest_scaled<E4M3> = 0x43e00000;  // 448

// Two tags that take the place of a codec for main params. NoMain: there are none, and the step
// works on param. Remainder: only their low 16 bits are stored; param has the others.
struct NoMain {
    using Storage = unsigned char;
};
struct Remainder {
    using Storage = unsigned short;
};

using Grad = ADAMS_GRAD;
using Param = ADAMS_PARAM;
using ExpAvg = ADAMS_EXP_AVG;
using Main = ADAMS_MAIN;

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

constexpr bool has_main = !is_same<Main, NoMain>;
constexpr bool main_is_scaled = largest_scaled<Main> != 0;
constexpr bool exp_avg_is_scaled = largest_scaled<ExpAvg> != 0;
// Whether the kernel counts the squares of updates, for their RMS, and multiplies updates by a
// factor. Kernels without guards have no code for it.
constexpr bool is_guarded = ADAMS_GUARDED;
// Whether the numerator of updates looks ahead by one step, and whether an element stays where its
// update would move it against its gradient.
constexpr bool is_nesterov = ADAMS_NESTEROV;
constexpr bool is_cautious = ADAMS_CAUTIOUS;
static_assert(ADAMS_SCALED == (main_is_scaled || exp_avg_is_scaled), "modes.py: is_scaled");

// `split` divides an fp32 main param into `high`, the nearest bf16 number (ties away from zero),
// and `low`, the 16 bits that `high` lacks. `low` is negative if `high` was rounded up. `join`
// restores every number exactly. A NaN becomes 0x7fff first, because rounding could carry into its
// sign.
ADAMS_FUNCTION float join(Word high, Word low) {
    const Word rest = Word(int(low) >> 16);
    return float_of(int(high + rest));
}
ADAMS_FUNCTION void split(float master, Word& high, Word& low) {
    const Word bits = master != master ? 0x7fff0000u : Word(bits_of(master));
    high = bits + 0x8000u;
    low = bits << 16;
}

// The scale of a tensor is a power of two, so that scaling itself rounds nothing. The largest
// magnitude lands in (limit / 2, limit].
struct Scale {
    float forward;  // what a stored number is multiplied by
    float inverse;
};
ADAMS_FUNCTION Scale scale_for(int amax, int limit) {
    amax = smaller(amax, 0x7f800000);  // any NaN counts as infinity
    const bool is_above = (amax & 0x7fffff) > (limit & 0x7fffff);
    const int exponent = (amax >> 23) - (limit >> 23) + 127 + (is_above ? 1 : 0);
    // Within [1, 253] both the scale and its inverse are normal.
    const int field = amax == 0 ? 127 : smaller(larger(exponent, 1), 253);
    return {float_of(field << 23), float_of((254 - field) << 23)};
}

enum Decay { NO_DECAY = 0, DECOUPLED = 1, L2 = 2 };

struct Scalars {
    float lr, grad_scale, correction;
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay;
    int decay;
};

// The scales of one tensor. A scale is 1 where the dtype has none.
struct TensorScales {
    float param;
    Scale exp_avg_old, exp_avg_new, main_old, main_new;
    float update;  // what the updates are multiplied by
};

// The largest magnitudes of a pass so far, as integers.
struct Amax {
    int param, exp_avg, main;
};

// The sum of the squares of updates: what megatron_adams.update.count_squares returns. It is an
// integer, so it does not depend on the order of the additions.
struct Squares {
    long long sum;  // in units of 2^-20
    int num_not_finite;

    ADAMS_FUNCTION int fixed_point(float update) {
        const float largest = 1073741760.0f;  // 2^30 - 64, also for a NaN: it compares as not less
        const float scaled = (update * update) * 1048576.0f;
        return int((scaled < largest ? scaled : largest) + 0.5f);
    }
    ADAMS_FUNCTION void add(Squares& squares, float update) {
        squares.sum += fixed_point(update);
        squares.num_not_finite += magnitude(update) >= 0x7f800000 ? 1 : 0;
    }
};

// A step has two halves. Both work on a number or on a vector of numbers.
// The first half moves exp_avg and returns v. `numerator_of` makes the update's numerator of the
// exp_avg that was moved, and `divisor_of` makes of v what it is divided by.
template <class Float>
ADAMS_FUNCTION Float gradient_of(Float grad, Float param, const Scalars& s) {
    const Float g = grad * s.grad_scale;
    return s.decay == L2 ? g + param * s.weight_decay : g;
}
template <class Float>
ADAMS_FUNCTION Float move_exp_avg(Float& exp_avg, Float grad, Float param, const Scalars& s) {
    const Float g = gradient_of(grad, param, s);
    const Float a = exp_avg * s.correction;
    const Float v = (a * a) * s.beta2 + (g * g) * s.one_minus_beta2;
    exp_avg = exp_avg * s.beta1 + g * s.one_minus_beta1;
    return v;
}
template <class Float>
ADAMS_FUNCTION Float numerator_of(Float exp_avg, Float grad, Float param, const Scalars& s) {
    // The compiler computes it once for both functions.
    const Float g = gradient_of(grad, param, s);
    const Float n = is_nesterov ? exp_avg * s.beta1 + g * s.one_minus_beta1 : exp_avg;
    // A NaN is not zero or below, so it stays.
    return is_cautious ? (n * g <= Float{} ? Float{} : n) : n;
}
ADAMS_FUNCTION float divisor_of(float v, const Scalars& s) { return square_root(v) + s.eps; }
// The second half: `update_of` divides, and `move_param` moves param by the update.
template <class Float>
ADAMS_FUNCTION Float update_of(Float numerator, Float divisor, const Scalars& s) {
    return (numerator * s.correction) / divisor;
}
template <class Float>
ADAMS_FUNCTION void move_param(Float& param, Float update, const Scalars& s) {
    const Float u = s.decay == DECOUPLED ? update + param * s.weight_decay : update;
    param = param - u * s.lr;
}
// The second half for one number, with guards: the update is counted, and multiplied by a factor.
ADAMS_FUNCTION void move_param(float& param, float numerator, float divisor, const Scalars& s,
                               float factor, Squares& squares) {
    float u = update_of(numerator, divisor, s);
    if (is_guarded) {
        Squares::add(squares, u);
        u = u * factor;
    }
    move_param(param, u, s);
}

ADAMS_FUNCTION float decode_exp_avg(Word word, const TensorScales& scales) {
    const float exp_avg = ExpAvg::decode(word);
    return exp_avg_is_scaled ? exp_avg * scales.exp_avg_old.forward : exp_avg;
}
ADAMS_FUNCTION Word encode_exp_avg(float exp_avg, const TensorScales& scales) {
    return ExpAvg::encode(exp_avg_is_scaled ? exp_avg * scales.exp_avg_new.inverse : exp_avg);
}

// How the main param of an element is read and written. Here it has a tensor of its own, `main`,
// and param is a copy for the model, which is only written.
template <class ParamCodec, class MainCodec>
struct Master {
    static constexpr bool reads_param = false;
    ADAMS_FUNCTION float decode(Word, Word main, const TensorScales& scales) {
        const float master = MainCodec::decode(main);
        return main_is_scaled ? master * scales.main_old.forward : master;
    }
    ADAMS_FUNCTION void encode(float master, Word& param, Word& main, const TensorScales& scales) {
        main = MainCodec::encode(main_is_scaled ? master * scales.main_new.inverse : master);
        param = ParamCodec::encode(ParamCodec::is_fp8 ? master * scales.param : master);
    }
};
// Without main params, the step reads and writes param itself.
template <class ParamCodec>
struct Master<ParamCodec, NoMain> {
    static_assert(!ParamCodec::is_fp8, "an fp8 param needs a master");
    static constexpr bool reads_param = true;
    ADAMS_FUNCTION float decode(Word param, Word, const TensorScales&) {
        return ParamCodec::decode(param);
    }
    ADAMS_FUNCTION void encode(float master, Word& param, Word&, const TensorScales&) {
        param = ParamCodec::encode(master);
    }
};
// With remainders, param has the upper half of the main param, and `main` the lower half.
template <>
struct Master<BF16, Remainder> {
    static constexpr bool reads_param = true;
    ADAMS_FUNCTION float decode(Word param, Word main, const TensorScales&) {
        return join(param, main);
    }
    ADAMS_FUNCTION void encode(float master, Word& param, Word& main, const TensorScales&) {
        split(master, param, main);
    }
};
constexpr bool reads_param = Master<Param, Main>::reads_param;

// What a pass over the elements does: update them, measure how large their scaled state becomes, or
// count the squares of their updates.
enum Pass { UPDATE, MEASURE, COUNT };

// Do one pass's work on element i of the four arrays.
template <Pass PASS>
ADAMS_FUNCTION void update_element(int i, const Grad::Storage* grad, Param::Storage* param,
                                   ExpAvg::Storage* exp_avg, Main::Storage* main, const Scalars& s,
                                   const TensorScales& scales, Amax& amax, Squares& squares) {
    const float g = Grad::decode(word_of(grad[i]));
    float m = decode_exp_avg(word_of(exp_avg[i]), scales);
    // An update depends on the main param only if weight decay is part of the gradient.
    const bool is_read = PASS != COUNT || s.decay == L2;
    Word param_word = reads_param && is_read ? word_of(param[i]) : 0u;
    Word main_word = has_main && is_read ? word_of(main[i]) : 0u;
    float p = Master<Param, Main>::decode(param_word, main_word, scales);

    const float divisor = divisor_of(move_exp_avg(m, g, p, s), s);
    float n = m;
    // Only where it differs: NVRTC makes other code of the paper's form if the function is called.
    if constexpr (is_nesterov || is_cautious) n = numerator_of(m, g, p, s);
    move_param(p, n, divisor, s, scales.update, squares);

    if (PASS == COUNT) return;
    if (PASS == MEASURE) {
        if (exp_avg_is_scaled) amax.exp_avg = larger(amax.exp_avg, magnitude(m));
        if (main_is_scaled) amax.main = larger(amax.main, magnitude(p));
        return;
    }
    if (Param::is_fp8) amax.param = larger(amax.param, magnitude(p));
    write_word(exp_avg[i], encode_exp_avg(m, scales));
    Master<Param, Main>::encode(p, param_word, main_word, scales);
    write_word(param[i], param_word);
    if (has_main) write_word(main[i], main_word);
}

}  // namespace adams
