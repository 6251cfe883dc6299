// The GPU form. Compiled by NVRTC; by the tests also by g++, under a shim that defines blockIdx etc.
//
// A block takes one chunk. Its threads move 16 bytes of the narrowest tensor at a time, so that every
// access of the vector loop is one or more of 128 bits; tensors that are not so aligned, and what is
// left over at a chunk's end, go element by element.

#include "element.h"
#include "multi_tensor.h"

namespace adams {

constexpr int BLOCK = 256;

struct alignas(16) Words {
    unsigned words[4];
};

constexpr int smallest(int a, int b) { return a < b ? a : b; }
constexpr int NARROWEST =
    smallest(smallest(sizeof(Grad::Storage), sizeof(Param::Storage)),
             smallest(sizeof(ExpAvg::Storage), has_main ? sizeof(Main::Storage) : 4));
constexpr int VECTOR = 16 / NARROWEST;  // elements
// Blocks that a multiprocessor must have registers for; 0: as it turns out. Left alone, or told more,
// the compiler spills to save registers; with these, never (tests/kernels/sass.py lists all modes).
constexpr int MIN_BLOCKS = VECTOR == 16 ? 2 : VECTOR == 8 ? 3 : 0;

template <class T>
ADAMS_FUNCTION bool is_aligned(const T* pointer) {
    return reinterpret_cast<unsigned long long>(pointer) % 16 == 0;
}

template <class T>
ADAMS_FUNCTION void load(T (&registers)[VECTOR], const T* memory) {
#pragma unroll
    for (int i = 0; i < int(VECTOR * sizeof(T) / 16); ++i) {
        reinterpret_cast<Words*>(registers)[i] = reinterpret_cast<const Words*>(memory)[i];
    }
}

template <class T>
ADAMS_FUNCTION void store(T* memory, const T (&registers)[VECTOR]) {
#pragma unroll
    for (int i = 0; i < int(VECTOR * sizeof(T) / 16); ++i) {
        const Words words = reinterpret_cast<const Words*>(registers)[i];
        Words* target = reinterpret_cast<Words*>(memory) + i;
#ifdef __CUDACC__
        // An assignment becomes four of 32 bits where the words are put together from 16-bit numbers.
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(words.words[0]),
                     "r"(words.words[1]), "r"(words.words[2]), "r"(words.words[3])
                     : "memory");
#else
        *target = words;
#endif
    }
}

// The squares of all lanes. A lane has less than 128 elements of a chunk, so its sum has 37 bits.
ADAMS_FUNCTION Squares of_warp(const Squares& lane) {
    const unsigned all = 0xffffffffu;
    const long long low = __reduce_add_sync(all, unsigned(lane.sum & 0xffffff));
    const long long high = __reduce_add_sync(all, unsigned(lane.sum >> 24));
    return {(high << 24) + low, int(__reduce_add_sync(all, unsigned(lane.num_not_finite)))};
}

template <Pass PASS>
ADAMS_FUNCTION void process(const Table& table, const Scalars& scalars) {
    constexpr bool STORE = PASS == UPDATE;
    const Chunk chunk = chunk_at(table, blockIdx.x);
    // By value: a pointer into the chunk would put it into local memory.
    const TensorScales scales = chunk.scales;
    Amax amax = {0, 0, 0};
    Squares squares = {0, 0};
    int done = 0;
    if (is_aligned(chunk.grad) && is_aligned(chunk.param) && is_aligned(chunk.exp_avg) &&
        (!has_main || is_aligned(chunk.main))) {
        done = chunk.count / VECTOR * VECTOR;
        for (int i = threadIdx.x * VECTOR; i < done; i += BLOCK * VECTOR) {
            alignas(16) Grad::Storage grad[VECTOR];
            alignas(16) Param::Storage param[VECTOR];
            alignas(16) ExpAvg::Storage exp_avg[VECTOR];
            alignas(16) Main::Storage main[VECTOR];
            load(grad, chunk.grad + i);
            load(exp_avg, chunk.exp_avg + i);
            if (PASS != COUNT || scalars.decay == L2) {
                if constexpr (has_main) load(main, chunk.main + i);
                if constexpr (reads_param) load(param, chunk.param + i);
            }
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                update_element<PASS>(k, grad, param, exp_avg, main, scalars, scales, amax,
                                     squares);
            }
            if constexpr (STORE) {
                store(chunk.exp_avg + i, exp_avg);
                if constexpr (has_main) store(chunk.main + i, main);
                store(chunk.param + i, param);
            }
        }
    }
    for (int i = done + threadIdx.x; i < chunk.count; i += BLOCK) {
        update_element<PASS>(i, chunk.grad, chunk.param, chunk.exp_avg, chunk.main, scalars,
                             scales, amax, squares);
    }

    if constexpr (PASS == MEASURE || (STORE && Param::is_fp8)) {
        // One atomic operation a warp. Every thread gets here.
        amax.param = __reduce_max_sync(0xffffffffu, amax.param);
        amax.exp_avg = __reduce_max_sync(0xffffffffu, amax.exp_avg);
        amax.main = __reduce_max_sync(0xffffffffu, amax.main);
        if (threadIdx.x % warpSize == 0) merge_amax<STORE>(table, chunk.tensor, amax);
    }
    if constexpr (PASS == COUNT || (STORE && is_guarded)) {
        squares = of_warp(squares);
        if (threadIdx.x % warpSize == 0) merge_squares(table, chunk.tensor, squares);
    }
    if constexpr (STORE) {
        if (chunk.is_first && threadIdx.x == 0) write_param_scale_inv(table, chunk);
    }
}

}  // namespace adams

extern "C" __global__ void __launch_bounds__(adams::BLOCK, adams::MIN_BLOCKS)
    adams_update(ADAMS_PARAMETERS) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::UPDATE>({table, num_tensors, amax}, ADAMS_SCALARS);
}

#if ADAMS_SCALED
extern "C" __global__ void __launch_bounds__(adams::BLOCK, adams::MIN_BLOCKS)
    adams_measure(ADAMS_PARAMETERS) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::MEASURE>({table, num_tensors, amax}, ADAMS_SCALARS);
}

extern "C" __global__ void __launch_bounds__(adams::BLOCK) adams_finish(ADAMS_PARAMETERS) {
    if (ADAMS_IS_SKIPPED) return;
    const int tensor = blockIdx.x * adams::BLOCK + threadIdx.x;
    if (tensor < num_tensors) adams::finish_tensor({table, num_tensors, amax}, tensor);
}
#endif

#if ADAMS_GUARDED
extern "C" __global__ void __launch_bounds__(adams::BLOCK, adams::MIN_BLOCKS)
    adams_rms(ADAMS_PARAMETERS) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::COUNT>({table, num_tensors, amax}, ADAMS_SCALARS);
}
#endif
