// The host form: the same elements in the same chunks, by OpenMP threads and the compiler's vectors.

#include "element.h"
#include "multi_tensor.h"

namespace adams {

// What is the same for all elements, where it is known when the loop is compiled: a loop that can do
// both computes roots and quotients for either kind of decay.
enum Form { PLAIN_NO_DECAY, PLAIN_DECOUPLED, ANY };  // plain: without a bias correction

template <bool STORE, Form FORM>
static void process(const Table& table, const Scalars& scalars, int num_threads) {
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
        int param_amax = 0, exp_avg_amax = 0, main_amax = 0;
#pragma omp simd reduction(max : param_amax, exp_avg_amax, main_amax)
        for (int i = 0; i < chunk.count; ++i) {
            Amax amax = {0, 0, 0};
            update_element<STORE>(i, grad, param, exp_avg, main, s, scales, amax);
            param_amax = larger(param_amax, amax.param);
            exp_avg_amax = larger(exp_avg_amax, amax.exp_avg);
            main_amax = larger(main_amax, amax.main);
        }
        merge_amax<STORE>(table, chunk.tensor, {param_amax, exp_avg_amax, main_amax});
        if (STORE && chunk.is_first) write_param_scale_inv(table, chunk);
    }
}

template <bool STORE>
static void process(const Table& table, const Scalars& scalars, int num_threads) {
    const bool is_plain = scalars.correction == 1.0f;
    if (is_plain && scalars.decay == NO_DECAY) {
        process<STORE, PLAIN_NO_DECAY>(table, scalars, num_threads);
    } else if (is_plain && scalars.decay == DECOUPLED) {
        process<STORE, PLAIN_DECOUPLED>(table, scalars, num_threads);
    } else {
        process<STORE, ANY>(table, scalars, num_threads);
    }
}

}  // namespace adams

extern "C" void adams_update(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<true>({table, num_tensors, amax}, ADAMS_SCALARS, num_threads);
}

#if ADAMS_SCALED
extern "C" void adams_measure(ADAMS_PARAMETERS, int num_threads) {
    if (ADAMS_IS_SKIPPED) return;
    adams::process<false>({table, num_tensors, amax}, ADAMS_SCALARS, num_threads);
}

extern "C" void adams_finish(ADAMS_PARAMETERS, int) {
    if (ADAMS_IS_SKIPPED) return;
    for (int t = 0; t < num_tensors; ++t) adams::finish_tensor({table, num_tensors, amax}, t);
}
#endif
