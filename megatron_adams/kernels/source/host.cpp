// The host form: the same elements in the same chunks, by OpenMP threads and the compiler's vectors.
//
// A step is to take no longer than its memory accesses do. So a chunk is gone through in short blocks,
// and while one is computed, the lines of a later one are fetched (`prefetch`). Where all that is
// written has 16 bits there is the most to compute for a byte, and a block is computed in another way
// (`update_block`): as pairs, two neighbours of 16 bits being read and written as one number, so that
// all vectors have 32-bit lanes, and none has to be spread over two or put together again; and in two
// loops, because a root and a quotient take so long that a processor does not get from one to the next
// vector's in a loop that has both.
// With AVX2 the pairs of bf16 have a block of their own, in bf16_avx2.h.

#include "element.h"
#include "multi_tensor.h"
#include "bf16_avx2.h"

namespace adams {

// What is the same for all elements, where it is known when the loop is compiled: a loop that can do
// both computes roots and quotients for either kind of decay.
enum Form { PLAIN_NO_DECAY, PLAIN_DECOUPLED, ANY };  // plain: without a bias correction

constexpr bool is_paired = sizeof(Param::Storage) == 2 && sizeof(ExpAvg::Storage) == 2 &&
                           (!has_main || sizeof(Main::Storage) == 2) &&
                           __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

// Whether numbers of a dtype are read and written in few instructions.
template <class Codec>
constexpr bool is_cheap = is_same<Codec, F32> || is_same<Codec, BF16> || is_same<Codec, NoMain> ||
                          is_same<Codec, Remainder>;

// Elements of a block. The fetches for one come all at once: where little is computed for a byte, it is
// short, so that they wait for each other less. (With guards, adding up the sums of short ones takes longer.)
constexpr int BLOCK = is_cheap<Grad> && is_cheap<Param> && is_same<ExpAvg, F32> && is_cheap<Main> &&
                              !is_guarded
                          ? 16
                          : 64;
// Bytes of each tensor from a block to what is fetched meanwhile. That may lie behind the end of the chunk:
// the thread's next chunk mostly follows it.
constexpr int AHEAD = 2048;
// A processor fetches on its own what follows in a page of memory, once it has seen accesses to the page.
// For it to begin early, the second line of a page is fetched when this many bytes are missing until the
// page's turn. (Its first line would change nothing; both measured on an Intel Xeon.)
constexpr int PAGE_LEAD = 768;

// While the block at `begin` of a chunk is computed. `array` is where the chunk begins in one of its tensors,
// which has `rest` elements from there on.
template <class Storage>
ADAMS_FUNCTION void prefetch(const Storage* array, int begin, long long rest) {
    constexpr int line = 64, page = 4096;  // bytes
    constexpr int ahead = AHEAD / int(sizeof(Storage));
    if (begin + ahead + BLOCK > rest) return;
    const Storage* const block = array + begin + ahead;
    // In integers: the page may lie behind the array, where a fetch does no harm.
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

// What lies between the two halves of an update, of the elements of even and of odd index.
struct Halfway {
    float exp_avg_low[BLOCK / 2], exp_avg_high[BLOCK / 2];
    float divisor_low[BLOCK / 2], divisor_high[BLOCK / 2];
};

// The halves are functions, and not the bodies of loops: the compiler makes arrays of what a loop's
// body declares and passes by reference, and then no vectors.
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
    halfway.divisor_low[i] = divisor_of(move_exp_avg(m_low, Grad::decode(g.low), p_low, s), s);
    halfway.divisor_high[i] = divisor_of(move_exp_avg(m_high, Grad::decode(g.high), p_high, s), s);
    halfway.exp_avg_low[i] = m_low;
    halfway.exp_avg_high[i] = m_high;
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
    move_param(low, halfway.exp_avg_low[i], halfway.divisor_low[i], s, scales.update, squares);
    move_param(high, halfway.exp_avg_high[i], halfway.divisor_high[i], s, scales.update, squares);
    Master<Param, Main>::encode(low, p.low, w.low, scales);
    Master<Param, Main>::encode(high, p.high, w.high, scales);
    write_pair(param, i, p);
    if (has_main) write_pair(main, i, w);
}

// A whole block in pairs.
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

// A block, or what is left of a chunk, element by element.
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
    // Guided: where another process takes a core for a while, the other threads go on with the rest.
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
            } else {  // the compiler does more with a number that it knows
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
    adams::process<adams::UPDATE>({table, num_tensors, chunk_size, amax}, ADAMS_SCALARS, num_threads);
}

#if ADAMS_SCALED
extern "C" void adams_measure(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::MEASURE>({table, num_tensors, chunk_size, amax}, ADAMS_SCALARS, num_threads);
}

extern "C" void adams_finish(ADAMS_PARAMETERS, int) {
    if (ADAMS_IS_SKIPPED) return;
    for (int t = 0; t < num_tensors; ++t) adams::finish_tensor({table, num_tensors, chunk_size, amax}, t);
}
#endif

#if ADAMS_GUARDED
extern "C" void adams_rms(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::COUNT>({table, num_tensors, chunk_size, amax}, ADAMS_SCALARS, num_threads);
}
#endif
