// The step on the CPU: the same elements in the same chunks as on a GPU, by OpenMP threads, in
// vectors that the compiler makes.
//
// The aim is a step that takes no longer than its memory accesses. A thread goes through its chunk
// in short blocks. While it computes one block, it fetches the cache lines of a later one
// (`prefetch`).
//
// Modes that write only 16-bit numbers compute the most per byte. `update_block` serves them, and
// differs in two ways:
// - It works on pairs. Two neighbours of 16 bits are read and written as one number. All vectors
//   then have 32-bit lanes, and none is widened or packed.
// - It has two loops, because roots and quotients take long. In one loop with both, a processor
//   does not reach the next vector's while those of the last one are computed.
// With AVX2, bf16_avx2.h has a block of its own for pairs of bf16.

#include "element.h"
#include "multi_tensor.h"
#include "bf16_avx2.h"

namespace adams {

// What a loop knows about the scalars when it is compiled. A loop for any kind of decay computes
// the roots and quotients once for each kind.
enum Form { PLAIN_NO_DECAY, PLAIN_DECOUPLED, ANY };  // PLAIN: no bias correction

constexpr bool is_paired = sizeof(Param::Storage) == 2 && sizeof(ExpAvg::Storage) == 2 &&
                           (!has_main || sizeof(Main::Storage) == 2) &&
                           __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

// Whether few instructions read and write a number of this dtype.
template <class Codec>
constexpr bool is_cheap = is_same<Codec, F32> || is_same<Codec, BF16> || is_same<Codec, NoMain> ||
                          is_same<Codec, Remainder>;

// Elements of a block. All fetches for a block are issued together. Where little is computed per
// byte, blocks are short, so that the fetches wait for each other less. With guards they are not,
// because adding up the sums of short blocks takes longer.
constexpr int BLOCK =
    is_cheap<Grad> && is_cheap<Param> && is_same<ExpAvg, F32> && is_cheap<Main> && !is_guarded ? 16
                                                                                               : 64;
// How far ahead of a block memory is fetched, in bytes of each tensor. That may be behind the end
// of the chunk: the thread's next chunk usually follows there.
constexpr int AHEAD = 2048;
// Once a processor has seen accesses to a page of memory, it fetches the page's next lines on its
// own. To make it begin early, the second line of a page is fetched this many bytes before the
// page's turn. Fetching the first line changes nothing. Both were measured on an Intel Xeon.
constexpr int PAGE_LEAD = 768;

// Fetch a later block while the one at `begin` of a chunk is computed. `array` points to the
// chunk's first element of one tensor, which has `rest` elements from there on.
template <class Storage>
ADAMS_FUNCTION void prefetch(const Storage* array, int begin, long long rest) {
    constexpr int line = 64, page = 4096;  // bytes
    constexpr int ahead = AHEAD / int(sizeof(Storage));
    if (begin + ahead + BLOCK > rest) return;
    const Storage* const block = array + begin + ahead;
    // Integers, not pointers: the page may lie behind the array. A fetch there does no harm.
    const unsigned long long later = reinterpret_cast<unsigned long long>(block) + PAGE_LEAD;
    const unsigned long long offset = later % page;
    if (offset < BLOCK * sizeof(Storage)) {
        __builtin_prefetch(reinterpret_cast<const void*>(later - offset + line));
    }
    for (int i = 0; i < BLOCK; i += line / int(sizeof(Storage))) __builtin_prefetch(block + i);
}

// Two neighbours in memory, `low` at the lower address.
struct Pair {
    Word low, high;
};
using TwoOf16Bits = unsigned __attribute__((aligned(2), may_alias));

template <class Storage>
ADAMS_FUNCTION Pair read_pair(const Storage* memory, int i) {
    if constexpr (sizeof(Storage) == 2) {
        const unsigned both = reinterpret_cast<const TwoOf16Bits*>(memory)[i];
        return {both << 16, both & 0xffff0000u};
    } else {
        return {word_of(memory[2 * i]), word_of(memory[2 * i + 1])};
    }
}
ADAMS_FUNCTION void write_pair(void* memory, int i, Pair pair) {
    reinterpret_cast<TwoOf16Bits*>(memory)[i] = pair.low >> 16 | (pair.high & 0xffff0000u);
}

// What the first half of a step hands to the second: `low` for the elements with even indices,
// `high` for those with odd indices.
struct Halfway {
    float numerator_low[BLOCK / 2], numerator_high[BLOCK / 2];
    float divisor_low[BLOCK / 2], divisor_high[BLOCK / 2];
};

// The halves are functions, not loop bodies. Where a loop's body declares variables and passes them
// by reference, the compiler makes arrays of them, and no vectors.
ADAMS_FUNCTION void move_exp_avgs(int i, const Grad::Storage* __restrict grad,
                                  const Param::Storage* __restrict param,
                                  ExpAvg::Storage* __restrict exp_avg,
                                  const Main::Storage* __restrict main, const Scalars& s,
                                  const TensorScales& scales, Halfway& halfway) {
    Pair p = {0u, 0u}, w = {0u, 0u};
    if (s.decay == L2) {
        if (reads_param) p = read_pair(param, i);
        if (has_main) w = read_pair(main, i);
    }
    const float p_low = Master<Param, Main>::decode(p.low, w.low, scales);
    const float p_high = Master<Param, Main>::decode(p.high, w.high, scales);
    const Pair g = read_pair(grad, i), m = read_pair(exp_avg, i);
    float m_low = decode_exp_avg(m.low, scales), m_high = decode_exp_avg(m.high, scales);
    const float g_low = Grad::decode(g.low), g_high = Grad::decode(g.high);
    halfway.divisor_low[i] = divisor_of(move_exp_avg(m_low, g_low, p_low, s), s);
    halfway.divisor_high[i] = divisor_of(move_exp_avg(m_high, g_high, p_high, s), s);
    halfway.numerator_low[i] = numerator_of(m_low, g_low, p_low, s);
    halfway.numerator_high[i] = numerator_of(m_high, g_high, p_high, s);
    write_pair(exp_avg, i, {encode_exp_avg(m_low, scales), encode_exp_avg(m_high, scales)});
}
ADAMS_FUNCTION void move_params(int i, Param::Storage* __restrict param,
                                Main::Storage* __restrict main, const Scalars& s,
                                const TensorScales& scales, const Halfway& halfway,
                                Squares& squares) {
    Pair p = {0u, 0u}, w = {0u, 0u};
    if (reads_param) p = read_pair(param, i);
    if (has_main) w = read_pair(main, i);
    float low = Master<Param, Main>::decode(p.low, w.low, scales);
    float high = Master<Param, Main>::decode(p.high, w.high, scales);
    move_param(low, halfway.numerator_low[i], halfway.divisor_low[i], s, scales.update, squares);
    move_param(high, halfway.numerator_high[i], halfway.divisor_high[i], s, scales.update, squares);
    Master<Param, Main>::encode(low, p.low, w.low, scales);
    Master<Param, Main>::encode(high, p.high, w.high, scales);
    write_pair(param, i, p);
    if (has_main) write_pair(main, i, w);
}

// Update a whole block in pairs.
ADAMS_FUNCTION void update_block(const Grad::Storage* grad, Param::Storage* param,
                                 ExpAvg::Storage* exp_avg, Main::Storage* main, const Scalars& s,
                                 const TensorScales& scales, Squares& squares) {
    Halfway halfway;
#pragma omp simd
    for (int i = 0; i < BLOCK / 2; ++i) {
        move_exp_avgs(i, grad, param, exp_avg, main, s, scales, halfway);
    }
    long long units = 0;
    int not_finite = 0;
#pragma omp simd reduction(+ : units, not_finite)
    for (int i = 0; i < BLOCK / 2; ++i) {
        Squares of_pair = {0, 0};
        move_params(i, param, main, s, scales, halfway, of_pair);
        units += of_pair.sum;
        not_finite += of_pair.num_not_finite;
    }
    squares.sum += units;
    squares.num_not_finite += not_finite;
}

// Process a block, or what is left of a chunk, element by element.
template <Pass PASS>
ADAMS_FUNCTION void process_block(int count, const Grad::Storage* __restrict grad,
                                  Param::Storage* __restrict param,
                                  ExpAvg::Storage* __restrict exp_avg,
                                  Main::Storage* __restrict main, const Scalars& s,
                                  const TensorScales& scales, Amax& amax, Squares& squares) {
    int param_amax = 0, exp_avg_amax = 0, main_amax = 0, num_not_finite = 0;
    long long sum = 0;
#pragma omp simd reduction(max : param_amax, exp_avg_amax, main_amax) \
    reduction(+ : sum, num_not_finite)
    for (int i = 0; i < count; ++i) {
        Amax of_element = {0, 0, 0};
        Squares square = {0, 0};
        update_element<PASS>(i, grad, param, exp_avg, main, s, scales, of_element, square);
        param_amax = larger(param_amax, of_element.param);
        exp_avg_amax = larger(exp_avg_amax, of_element.exp_avg);
        main_amax = larger(main_amax, of_element.main);
        sum += square.sum;
        num_not_finite += square.num_not_finite;
    }
    amax.param = larger(amax.param, param_amax);
    amax.exp_avg = larger(amax.exp_avg, exp_avg_amax);
    amax.main = larger(amax.main, main_amax);
    squares.sum += sum;
    squares.num_not_finite += num_not_finite;
}

template <Pass PASS, Form FORM>
static void process(const Table& table, const Scalars& scalars, int num_threads) {
    constexpr bool STORE = PASS == UPDATE;
    const long long num_chunks = Table::get(table, CHUNK_END, table.num_tensors - 1);
    // schedule(guided): if another process takes a core for a while, the other threads go on with
    // the rest.
#pragma omp parallel for num_threads(num_threads) schedule(guided)
    for (long long index = 0; index < num_chunks; ++index) {
        const Chunk chunk = chunk_at(table, index);
        Scalars s = scalars;
        if (FORM != ANY) {
            s.decay = FORM == PLAIN_DECOUPLED ? DECOUPLED : NO_DECAY;
            s.correction = 1.0f;
        }
        const TensorScales scales = chunk.scales;
        const bool is_master_read = PASS != COUNT || s.decay == L2;
        Amax amax = {0, 0, 0};
        Squares squares = {0, 0};
        for (int begin = 0; begin < chunk.count; begin += BLOCK) {
            const Grad::Storage* __restrict grad = chunk.grad + begin;
            Param::Storage* __restrict param = chunk.param + begin;
            ExpAvg::Storage* __restrict exp_avg = chunk.exp_avg + begin;
            Main::Storage* __restrict main = has_main ? chunk.main + begin : nullptr;
            const int count = smaller(chunk.count - begin, BLOCK);
            prefetch(chunk.grad, begin, chunk.rest);
            prefetch(chunk.exp_avg, begin, chunk.rest);
            if (STORE || (reads_param && is_master_read)) prefetch(chunk.param, begin, chunk.rest);
            if (has_main && is_master_read) prefetch(chunk.main, begin, chunk.rest);
            if (count < BLOCK) {
                process_block<PASS>(count, grad, param, exp_avg, main, s, scales, amax, squares);
            } else if constexpr (STORE && fits_avx2) {
                update_block_avx2<BLOCK>(grad, param, exp_avg, main, s);
            } else if constexpr (STORE && is_paired) {
                update_block(grad, param, exp_avg, main, s, scales, squares);
            } else {  // the compiler does more with a constant
                process_block<PASS>(BLOCK, grad, param, exp_avg, main, s, scales, amax, squares);
            }
        }
        if (PASS != COUNT) {
            merge_amax<STORE>(table, chunk.tensor, amax);
        }
        if (PASS == COUNT || (STORE && is_guarded)) {
            merge_squares(table, chunk.tensor, squares);
        }
        if (STORE && chunk.is_first) write_param_scale_inv(table, chunk);
    }
}

template <Pass PASS>
static void process(const Table& table, const Scalars& scalars, int num_threads) {
    const bool is_plain = scalars.correction == 1.0f;
    if (is_plain && scalars.decay == NO_DECAY) {
        process<PASS, PLAIN_NO_DECAY>(table, scalars, num_threads);
    } else if (is_plain && scalars.decay == DECOUPLED) {
        process<PASS, PLAIN_DECOUPLED>(table, scalars, num_threads);
    } else {
        process<PASS, ANY>(table, scalars, num_threads);
    }
}

}  // namespace adams

extern "C" void adams_update(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::UPDATE>({table, num_tensors, chunk_size, amax}, ADAMS_SCALARS,
                                  num_threads);
}

#if ADAMS_SCALED
extern "C" void adams_measure(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::MEASURE>({table, num_tensors, chunk_size, amax}, ADAMS_SCALARS,
                                   num_threads);
}

extern "C" void adams_finish(ADAMS_PARAMETERS, int) {
    if (ADAMS_IS_SKIPPED) return;
    for (int t = 0; t < num_tensors; ++t)
        adams::finish_tensor({table, num_tensors, chunk_size, amax}, t);
}
#endif

#if ADAMS_GUARDED
extern "C" void adams_rms(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::COUNT>({table, num_tensors, chunk_size, amax}, ADAMS_SCALARS,
                                 num_threads);
}
#endif
