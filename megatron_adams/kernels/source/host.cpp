// The host form: the same elements in the same chunks, by OpenMP threads and the compiler's vectors.
//
// `process` goes over a chunk element by element, and waits for memory. Where all that is written has 16
// bits it would rather wait for itself, and `update_pairs` comes first, which differs in two things.
// Pairs: two neighbours of 16 bits are read and written as one number, so that all vectors have 32-bit
// lanes; narrower ones would have to be spread over two vectors and put together again. Two loops with
// a block of numbers between them: a root and a quotient take long, and in one loop a processor does not
// look as far ahead as the next iteration's. Measured with AVX2, it takes two thirds of the time.

#include "element.h"
#include "multi_tensor.h"

namespace adams {

// What is the same for all elements, where it is known when the loop is compiled: a loop that can do
// both computes roots and quotients for either kind of decay.
enum Form { PLAIN_NO_DECAY, PLAIN_DECOUPLED, ANY };  // plain: without a bias correction

template <Form FORM>
ADAMS_FUNCTION Scalars scalars_of_form(Scalars s) {
    if (FORM != ANY) {
        s.decay = FORM == PLAIN_DECOUPLED ? DECOUPLED : NO_DECAY;
        s.correction = 1.0f;
    }
    return s;
}

constexpr bool is_paired = sizeof(Param::Storage) == 2 && sizeof(ExpAvg::Storage) == 2 &&
                           (!has_main || sizeof(Main::Storage) == 2) &&
                           __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;

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
struct Block {
    static constexpr int size = 1024;  // pairs: with the tensors' own, half of a 32 KiB cache
    float exp_avg_low[size], exp_avg_high[size];
    float divisor_low[size], divisor_high[size];
};

// The halves are functions, and not the bodies of loops: the compiler makes arrays of what a loop's
// body declares and passes by reference, and then no vectors.
ADAMS_FUNCTION void move_exp_avgs(int i, const Grad::Storage* __restrict grad,
                                  const Param::Storage* __restrict param,
                                  ExpAvg::Storage* __restrict exp_avg,
                                  const Main::Storage* __restrict main, const Scalars& s,
                                  const TensorScales& scales, Block& block) {
    Pair p = {0u, 0u}, w = {0u, 0u};
    if (s.decay == L2) {
        if (reads_param) p = read_pair(param, i);
        if (has_main) w = read_pair(main, i);
    }
    const float p_low = Master<Param, Main>::decode(p.low, w.low, scales);
    const float p_high = Master<Param, Main>::decode(p.high, w.high, scales);
    const Pair g = read_pair(grad, i), m = read_pair(exp_avg, i);
    float m_low = decode_exp_avg(m.low, scales), m_high = decode_exp_avg(m.high, scales);
    block.divisor_low[i] = move_exp_avg(m_low, Grad::decode(g.low), p_low, s);
    block.divisor_high[i] = move_exp_avg(m_high, Grad::decode(g.high), p_high, s);
    block.exp_avg_low[i] = m_low;
    block.exp_avg_high[i] = m_high;
    write_pair(exp_avg, i, {encode_exp_avg(m_low, scales), encode_exp_avg(m_high, scales)});
}
ADAMS_FUNCTION void move_params(int i, Param::Storage* __restrict param,
                                Main::Storage* __restrict main, const Scalars& s,
                                const TensorScales& scales, const Block& block, Squares& squares) {
    Pair p = {0u, 0u}, w = {0u, 0u};
    if (reads_param) p = read_pair(param, i);
    if (has_main) w = read_pair(main, i);
    float low = Master<Param, Main>::decode(p.low, w.low, scales);
    float high = Master<Param, Main>::decode(p.high, w.high, scales);
    move_param(low, block.exp_avg_low[i], block.divisor_low[i], s, scales.update, squares);
    move_param(high, block.exp_avg_high[i], block.divisor_high[i], s, scales.update, squares);
    Master<Param, Main>::encode(low, p.low, w.low, scales);
    Master<Param, Main>::encode(high, p.high, w.high, scales);
    write_pair(param, i, p);
    if (has_main) write_pair(main, i, w);
}

// Update all of a chunk but the last element of an odd number.
template <Form FORM>
static Squares update_pairs(const Chunk& chunk, const Scalars& scalars) {
    const Scalars s = scalars_of_form<FORM>(scalars);
    const TensorScales scales = chunk.scales;
    const int num_pairs = chunk.count / 2;
    long long units = 0;
    int not_finite = 0;
    Block block;
    for (int begin = 0; begin < num_pairs; begin += Block::size) {
        const int count = smaller(num_pairs - begin, Block::size);
        const Grad::Storage* grad = chunk.grad + 2 * begin;
        Param::Storage* param = chunk.param + 2 * begin;
        ExpAvg::Storage* exp_avg = chunk.exp_avg + 2 * begin;
        Main::Storage* main = has_main ? chunk.main + 2 * begin : nullptr;
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            move_exp_avgs(i, grad, param, exp_avg, main, s, scales, block);
        }
#pragma omp simd reduction(+ : units, not_finite)
        for (int i = 0; i < count; ++i) {
            Squares squares = {0, 0};
            move_params(i, param, main, s, scales, block, squares);
            units += squares.sum;
            not_finite += squares.num_not_finite;
        }
    }
    return {units, not_finite};
}

template <Pass PASS, Form FORM>
static void process(const Table& table, const Scalars& scalars, int num_threads) {
    constexpr bool STORE = PASS == UPDATE;
    const long long num_chunks = Table::get(table, CHUNK_END, table.num_tensors - 1);
    // Guided: where another process takes a core for a while, the other threads go on with the rest.
#pragma omp parallel for num_threads(num_threads) schedule(guided)
    for (long long index = 0; index < num_chunks; ++index) {
        const Chunk chunk = chunk_at(table, index);
        const Grad::Storage* __restrict grad = chunk.grad;
        Param::Storage* __restrict param = chunk.param;
        ExpAvg::Storage* __restrict exp_avg = chunk.exp_avg;
        Main::Storage* __restrict main = chunk.main;
        const Scalars s = scalars_of_form<FORM>(scalars);
        const TensorScales scales = chunk.scales;
        int done = 0;
        int param_amax = 0, exp_avg_amax = 0, main_amax = 0, num_not_finite = 0;
        long long sum = 0;
        if constexpr (STORE && is_paired) {
            const Squares squares = update_pairs<FORM>(chunk, scalars);
            sum = squares.sum;
            num_not_finite = squares.num_not_finite;
            done = chunk.count / 2 * 2;
        }
#pragma omp simd reduction(max : param_amax, exp_avg_amax, main_amax) \
    reduction(+ : sum, num_not_finite)
        for (int i = done; i < chunk.count; ++i) {
            Amax amax = {0, 0, 0};
            Squares squares = {0, 0};
            update_element<PASS>(i, grad, param, exp_avg, main, s, scales, amax, squares);
            param_amax = larger(param_amax, amax.param);
            exp_avg_amax = larger(exp_avg_amax, amax.exp_avg);
            main_amax = larger(main_amax, amax.main);
            sum += squares.sum;
            num_not_finite += squares.num_not_finite;
        }
        if (PASS != COUNT) {
            merge_amax<STORE>(table, chunk.tensor, {param_amax, exp_avg_amax, main_amax});
        }
        if (PASS == COUNT || (STORE && is_guarded)) {
            merge_squares(table, chunk.tensor, {sum, num_not_finite});
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
    adams::process<adams::UPDATE>({table, num_tensors, amax}, ADAMS_SCALARS, num_threads);
}

#if ADAMS_SCALED
extern "C" void adams_measure(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::MEASURE>({table, num_tensors, amax}, ADAMS_SCALARS, num_threads);
}

extern "C" void adams_finish(ADAMS_PARAMETERS, int) {
    if (ADAMS_IS_SKIPPED) return;
    for (int t = 0; t < num_tensors; ++t) adams::finish_tensor({table, num_tensors, amax}, t);
}
#endif

#if ADAMS_GUARDED
extern "C" void adams_rms(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<adams::COUNT>({table, num_tensors, amax}, ADAMS_SCALARS, num_threads);
}
#endif
