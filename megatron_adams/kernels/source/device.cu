// The step on a GPU. NVRTC compiles it. The tests also compile it with g++ and a shim that defines
// blockIdx and so on.
//
// One block of threads takes one chunk. A thread moves a group of neighbouring elements at a time,
// in as few accesses to each tensor as possible. Tensors that are not aligned for that, and what is
// left over at the end of a chunk, are processed element by element.
// megatron_adams/kernels/tuning.py describes ADAMS_BLOCK, ADAMS_GROUP, ADAMS_UNROLL,
// ADAMS_MIN_BLOCKS and the two hints.

#include "element.h"
#include "multi_tensor.h"

namespace adams {

constexpr int BLOCK = ADAMS_BLOCK;

constexpr int smallest(int a, int b) { return a < b ? a : b; }
constexpr int NARROWEST =
    smallest(smallest(sizeof(Grad::Storage), sizeof(Param::Storage)),
             smallest(sizeof(ExpAvg::Storage), has_main ? sizeof(Main::Storage) : 4));
constexpr int GROUP = ADAMS_GROUP != 0 ? ADAMS_GROUP : 16 / NARROWEST;  // elements
constexpr int HELD = GROUP * ADAMS_UNROLL;  // elements that a thread holds at a time
// How many blocks a multiprocessor must have registers for; 0 leaves it to the compiler. Without
// these numbers, or with larger ones, the compiler spills to save registers. With them it hardly
// ever does (tests/kernels/sass.py lists all modes).
constexpr int MIN_BLOCKS = ADAMS_MIN_BLOCKS >= 0 ? ADAMS_MIN_BLOCKS
                           : HELD == 16          ? 2
                           : HELD == 8           ? 3
                                                 : 0;

template <class T>
ADAMS_FUNCTION bool is_aligned(const T* pointer) {
    return reinterpret_cast<unsigned long long>(pointer) % 16 == 0;
}

// The bytes that one access moves.
template <int BYTES>
struct alignas(BYTES) Piece {
    unsigned words[BYTES / 4];
};

#ifdef __CUDACC__
// In assembly, because the compiler splits an assignment whose words are put together from smaller
// numbers.
#define ADAMS_LOAD "ld.global" ADAMS_LOAD_HINT
#define ADAMS_STORE "st.global" ADAMS_STORE_HINT
ADAMS_FUNCTION void read_piece(Piece<16>& piece, const void* memory) {
    asm volatile(ADAMS_LOAD ".v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(piece.words[0]), "=r"(piece.words[1]), "=r"(piece.words[2]),
                   "=r"(piece.words[3])
                 : "l"(memory));
}
ADAMS_FUNCTION void read_piece(Piece<8>& piece, const void* memory) {
    asm volatile(ADAMS_LOAD ".v2.u32 {%0, %1}, [%2];"
                 : "=r"(piece.words[0]), "=r"(piece.words[1])
                 : "l"(memory));
}
ADAMS_FUNCTION void read_piece(Piece<4>& piece, const void* memory) {
    asm volatile(ADAMS_LOAD ".u32 %0, [%1];" : "=r"(piece.words[0]) : "l"(memory));
}
ADAMS_FUNCTION void write_piece(void* memory, const Piece<16>& piece) {
    asm volatile(ADAMS_STORE ".v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(memory), "r"(piece.words[0]),
                 "r"(piece.words[1]), "r"(piece.words[2]), "r"(piece.words[3])
                 : "memory");
}
ADAMS_FUNCTION void write_piece(void* memory, const Piece<8>& piece) {
    asm volatile(ADAMS_STORE ".v2.u32 [%0], {%1, %2};" ::"l"(memory), "r"(piece.words[0]),
                 "r"(piece.words[1])
                 : "memory");
}
ADAMS_FUNCTION void write_piece(void* memory, const Piece<4>& piece) {
    asm volatile(ADAMS_STORE ".u32 [%0], %1;" ::"l"(memory), "r"(piece.words[0]) : "memory");
}
#else
template <int BYTES>
ADAMS_FUNCTION void read_piece(Piece<BYTES>& piece, const void* memory) {
    piece = *static_cast<const Piece<BYTES>*>(memory);
}
template <int BYTES>
ADAMS_FUNCTION void write_piece(void* memory, const Piece<BYTES>& piece) {
    *static_cast<Piece<BYTES>*>(memory) = piece;
}
#endif

// The groups of one tensor that a thread holds. In memory, the groups of all other threads of the
// block lie between two of them, so that the accesses of a warp leave no gaps.
template <class T, int UNROLL>
struct Groups {
    static constexpr int BYTES = smallest(GROUP * sizeof(T), 16);
    static constexpr int PIECES = GROUP * sizeof(T) / BYTES;  // per group
    using Access = Piece<BYTES>;

    alignas(16) T elements[UNROLL * GROUP];

    // How far a piece lies behind the first one, in elements.
    ADAMS_FUNCTION int offset_of(int piece) {
        return piece / PIECES * BLOCK * GROUP + piece % PIECES * (BYTES / int(sizeof(T)));
    }
};
template <class T, int UNROLL>
ADAMS_FUNCTION void read_groups(Groups<T, UNROLL>& groups, const T* memory) {
    using G = Groups<T, UNROLL>;
#pragma unroll
    for (int i = 0; i < UNROLL * G::PIECES; ++i) {
        read_piece(reinterpret_cast<typename G::Access*>(groups.elements)[i],
                   memory + G::offset_of(i));
    }
}
template <class T, int UNROLL>
ADAMS_FUNCTION void write_groups(T* memory, const Groups<T, UNROLL>& groups) {
    using G = Groups<T, UNROLL>;
#pragma unroll
    for (int i = 0; i < UNROLL * G::PIECES; ++i) {
        write_piece(memory + G::offset_of(i),
                    reinterpret_cast<const typename G::Access*>(groups.elements)[i]);
    }
}

// Add up the squares of all lanes. A lane has at most 2^11 elements of a chunk, so its sum has at
// most 41 bits.
ADAMS_FUNCTION Squares of_warp(const Squares& lane) {
    const unsigned all = 0xffffffffu;
    const long long low = __reduce_add_sync(all, unsigned(lane.sum & 0xffffff));
    const long long high = __reduce_add_sync(all, unsigned(lane.sum >> 24));
    return {(high << 24) + low, int(__reduce_add_sync(all, unsigned(lane.num_not_finite)))};
}

// Process the elements from `begin` on, UNROLL groups per thread at a time. Returns the first
// element that is left. With more than one group at a time, the block processes whole rounds only.
template <Pass PASS, int UNROLL>
ADAMS_FUNCTION int process_groups(int begin, const Chunk& chunk, const Scalars& scalars,
                                  const TensorScales& scales, Amax& amax, Squares& squares) {
    constexpr int ROUND = BLOCK * GROUP * UNROLL;
    constexpr int WHOLE = UNROLL == 1 ? GROUP : ROUND;
    const int end = begin + (chunk.count - begin) / WHOLE * WHOLE;
    for (int i = begin + int(threadIdx.x) * GROUP; i < end; i += ROUND) {
        Groups<Grad::Storage, UNROLL> grad;
        Groups<Param::Storage, UNROLL> param;
        Groups<ExpAvg::Storage, UNROLL> exp_avg;
        Groups<Main::Storage, UNROLL> main;
        read_groups(grad, chunk.grad + i);
        read_groups(exp_avg, chunk.exp_avg + i);
        if (PASS != COUNT || scalars.decay == L2) {
            if constexpr (has_main) read_groups(main, chunk.main + i);
            if constexpr (reads_param) read_groups(param, chunk.param + i);
        }
#pragma unroll
        for (int k = 0; k < UNROLL * GROUP; ++k) {
            update_element<PASS>(k, grad.elements, param.elements, exp_avg.elements, main.elements,
                                 scalars, scales, amax, squares);
        }
        if constexpr (PASS == UPDATE) {
            write_groups(chunk.exp_avg + i, exp_avg);
            if constexpr (has_main) write_groups(chunk.main + i, main);
            write_groups(chunk.param + i, param);
        }
    }
    return end;
}

template <Pass PASS>
ADAMS_FUNCTION void process(const Table& table, const Scalars& scalars) {
    constexpr bool STORE = PASS == UPDATE;
    const Chunk chunk = chunk_at(table, blockIdx.x);
    // A copy, because a pointer into the chunk would put the chunk into local memory.
    const TensorScales scales = chunk.scales;
    Amax amax = {0, 0, 0};
    Squares squares = {0, 0};
    int done = 0;
    if (is_aligned(chunk.grad) && is_aligned(chunk.param) && is_aligned(chunk.exp_avg) &&
        (!has_main || is_aligned(chunk.main))) {
        if constexpr (ADAMS_UNROLL > 1) {
            done = process_groups<PASS, ADAMS_UNROLL>(0, chunk, scalars, scales, amax, squares);
        }
        done = process_groups<PASS, 1>(done, chunk, scalars, scales, amax, squares);
    }
    // A thread rarely has more than a few elements left. If it were unrolled, this loop would take
    // registers from the one above.
#pragma unroll 1
    for (int i = done + threadIdx.x; i < chunk.count; i += BLOCK) {
        update_element<PASS>(i, chunk.grad, chunk.param, chunk.exp_avg, chunk.main, scalars, scales,
                             amax, squares);
    }

    if constexpr (PASS == MEASURE || (STORE && Param::is_fp8)) {
        // One atomic operation per warp. Every thread gets here, as the reductions demand.
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
    adams::process<adams::UPDATE>({table, num_tensors, chunk_size, amax}, ADAMS_SCALARS);
}

#if ADAMS_SCALED
extern "C" __global__ void __launch_bounds__(adams::BLOCK, adams::MIN_BLOCKS)
    adams_measure(ADAMS_PARAMETERS) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::MEASURE>({table, num_tensors, chunk_size, amax}, ADAMS_SCALARS);
}

extern "C" __global__ void __launch_bounds__(adams::BLOCK) adams_finish(ADAMS_PARAMETERS) {
    if (ADAMS_IS_SKIPPED) return;
    const int tensor = blockIdx.x * adams::BLOCK + threadIdx.x;
    if (tensor < num_tensors) adams::finish_tensor({table, num_tensors, chunk_size, amax}, tensor);
}
#endif

#if ADAMS_GUARDED
extern "C" __global__ void __launch_bounds__(adams::BLOCK, adams::MIN_BLOCKS)
    adams_rms(ADAMS_PARAMETERS) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::COUNT>({table, num_tensors, chunk_size, amax}, ADAMS_SCALARS);
}
#endif
