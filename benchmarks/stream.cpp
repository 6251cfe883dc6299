// The memory traffic of one AdamS step with next to no arithmetic. It shows how fast a step can be
// at best.
//
// It is compiled like the kernels: by g++ or clang++ for the host, by NVRTC for a GPU. Macros
// describe the tensors of a mode. STREAM_GRAD, STREAM_PARAM, STREAM_EXP_AVG and STREAM_MAIN are
// their widths (U8 to U32). STREAM_HAS_MAIN is set if `main` exists, and STREAM_READS_PARAM if
// param holds the main params or their upper halves.

using U8 = unsigned char;
using U16 = unsigned short;
using U32 = unsigned int;

using Grad = STREAM_GRAD;
using Param = STREAM_PARAM;
using ExpAvg = STREAM_EXP_AVG;
using Main = STREAM_MAIN;

#ifdef __CUDACC__
#define STREAM_FUNCTION static __device__ __forceinline__
#else
#define STREAM_FUNCTION static inline __attribute__((always_inline))
#endif

#define STREAM_PARAMETERS                                                                   \
    long long count, const Grad *grad, Param *param, ExpAvg *exp_avg, Main *main, U32 mask, \
        U32 *seen

// The mask is 0, so every number stays what it is. The compiler cannot know that.
STREAM_FUNCTION void update(long long i, const Grad* grad, Param* param, ExpAvg* exp_avg,
                            Main* main, U32 mask) {
    const U32 bits = grad[i] & mask;
    exp_avg[i] = ExpAvg(exp_avg[i] ^ bits);
    if (STREAM_HAS_MAIN) main[i] = Main(main[i] ^ bits);
    param[i] = Param(STREAM_READS_PARAM ? param[i] ^ bits : main[i] ^ bits);
}

// What the kernel reads before it writes scaled state.
STREAM_FUNCTION U32 read(long long i, const Grad* grad, const Param* param, const ExpAvg* exp_avg,
                         const Main* main) {
    return grad[i] | exp_avg[i] | (STREAM_HAS_MAIN ? main[i] : 0u) |
           (STREAM_READS_PARAM ? param[i] : 0u);
}

#ifdef __CUDACC__

constexpr int BLOCK = 256;
constexpr long long CHUNK = 16384;
constexpr int smallest(int a, int b) { return a < b ? a : b; }
constexpr int VECTOR = 16 / smallest(smallest(sizeof(Grad), sizeof(Param)),
                                     smallest(sizeof(ExpAvg), STREAM_HAS_MAIN ? sizeof(Main) : 4));

struct alignas(16) Words {
    U32 words[4];
};

template <class T>
STREAM_FUNCTION void copy(T* to, const T* from) {
#pragma unroll
    for (int i = 0; i < int(VECTOR * sizeof(T) / 16); ++i) {
        reinterpret_cast<Words*>(to)[i] = reinterpret_cast<const Words*>(from)[i];
    }
}

// A block takes CHUNK elements; count is a multiple of 16.
template <bool STORE>
STREAM_FUNCTION void process(STREAM_PARAMETERS) {
    const long long begin = blockIdx.x * CHUNK;
    const long long end = begin + CHUNK < count ? begin + CHUNK : count;
    U32 found = 0;
    for (long long i = begin + threadIdx.x * VECTOR; i < end; i += BLOCK * VECTOR) {
        alignas(16) Grad g[VECTOR];
        alignas(16) Param p[VECTOR];
        alignas(16) ExpAvg m[VECTOR];
        alignas(16) Main w[VECTOR];
        copy(g, grad + i);
        copy(m, exp_avg + i);
        if constexpr (STREAM_HAS_MAIN) copy(w, main + i);
        if constexpr (STREAM_READS_PARAM) copy(p, param + i);
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) {
            if constexpr (STORE) {
                update(k, g, p, m, w, mask);
            } else {
                found |= read(k, g, p, m, w);
            }
        }
        if constexpr (STORE) {
            copy(exp_avg + i, m);
            if constexpr (STREAM_HAS_MAIN) copy(main + i, w);
            copy(param + i, p);
        }
    }
    // Always false, but the compiler cannot know that: it has to compute `found`.
    if (!STORE && (found & mask)) *seen = found;
}

extern "C" __global__ void __launch_bounds__(BLOCK) stream_update(STREAM_PARAMETERS) {
    process<true>(count, grad, param, exp_avg, main, mask, seen);
}
extern "C" __global__ void __launch_bounds__(BLOCK) stream_measure(STREAM_PARAMETERS) {
    process<false>(count, grad, param, exp_avg, main, mask, seen);
}

#else

extern "C" void stream_update(long long count, const Grad* __restrict grad, Param* __restrict param,
                              ExpAvg* __restrict exp_avg, Main* __restrict main, U32 mask, U32*,
                              int num_threads) {
#pragma omp parallel for simd num_threads(num_threads) schedule(static)
    for (long long i = 0; i < count; ++i) update(i, grad, param, exp_avg, main, mask);
}
extern "C" void stream_measure(long long count, const Grad* grad, const Param* param,
                               const ExpAvg* exp_avg, const Main* main, U32, U32* seen,
                               int num_threads) {
    U32 found = 0;
#pragma omp parallel for simd num_threads(num_threads) schedule(static) reduction(| : found)
    for (long long i = 0; i < count; ++i) found |= read(i, grad, param, exp_avg, main);
    *seen = found;
}

#endif
