// The host form: the same elements in the same chunks, by OpenMP threads and the compiler's vectors.

#include "element.h"
#include "multi_tensor.h"

namespace adams {

// What is the same for all elements, where it is known when the loop is compiled: a loop that can do
// both computes roots and quotients for either kind of decay.
enum Form { PLAIN_NO_DECAY, PLAIN_DECOUPLED, ANY };  // plain: without a bias correction

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
        Scalars s = scalars;
        if (FORM != ANY) {
            s.decay = FORM == PLAIN_DECOUPLED ? DECOUPLED : NO_DECAY;
            s.correction = 1.0f;
        }
        const TensorScales scales = chunk.scales;
        int param_amax = 0, exp_avg_amax = 0, main_amax = 0, num_not_finite = 0;
        long long sum = 0;
#pragma omp simd reduction(max : param_amax, exp_avg_amax, main_amax) \
    reduction(+ : sum, num_not_finite)
        for (int i = 0; i < chunk.count; ++i) {
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
