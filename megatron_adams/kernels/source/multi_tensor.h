// Many tensors in one launch: the table of tensors, and what a chunk of one of them needs.
//
// The table is an array of NUM_FIELDS rows of num_tensors 64-bit integers, in the memory of the
// device that reads it; megatron_adams/kernels/table.py writes it.

namespace adams {

enum Field {
    NUMEL,
    CHUNK_END,  // number of chunks of this tensor and all before it
    GRAD,       // pointers from here on; 0 where the mode has no such tensor
    PARAM,
    EXP_AVG,
    MAIN,
    PARAM_SCALE,  // fp8 params: one fp32 number each; this one is only read
    PARAM_AMAX,
    PARAM_SCALE_INV,
    EXP_AVG_SCALE,  // scaled state: one fp32 number each
    MAIN_SCALE,
    UPDATE_SUM,     // guards: two 64-bit integers each, as in Squares; 0 if not wanted
    UPDATE_FACTOR,  // guards: one fp32 number each; 0 if not wanted
    NUM_FIELDS
};

// The arguments of every entry point. One block of a GPU, or one iteration of the host's loop,
// takes one chunk of at most chunk_size elements, a multiple of 16. A scalar that also has a
// pointer is read through the pointer unless it is null, so that a CUDA graph can be replayed with
// new values. amax is (2, num_tensors), and zero between steps.
#define ADAMS_PARAMETERS                                                                          \
    const long long *table, int num_tensors, int chunk_size, int *amax, float lr,                 \
        const float *lr_pointer, float grad_scale, const float *grad_scale_pointer,               \
        float correction, const float *correction_pointer, const float *found_inf, float beta1,   \
        float one_minus_beta1, float beta2, float one_minus_beta2, float eps, float weight_decay, \
        int decay

#define ADAMS_SCALARS                                                                             \
    adams::Scalars {                                                                              \
        lr_pointer ? *lr_pointer : lr, grad_scale_pointer ? *grad_scale_pointer : grad_scale,     \
            correction_pointer ? *correction_pointer : correction, beta1, one_minus_beta1, beta2, \
            one_minus_beta2, eps, weight_decay, decay                                             \
    }

#define ADAMS_IS_SKIPPED (found_inf && *found_inf != 0.0f)

struct Table {
    const long long* rows;
    int num_tensors;
    int chunk_size;
    int* amax;

    ADAMS_FUNCTION long long get(const Table& table, Field field, int tensor) {
        return table.rows[(long long)field * table.num_tensors + tensor];
    }
    template <class T>
    ADAMS_FUNCTION T* pointer(const Table& table, Field field, int tensor, long long offset = 0) {
        T* address = reinterpret_cast<T*>(get(table, field, tensor)) + offset;
#ifdef __CUDACC__
        // The address was a number, so the compiler does not know its memory space.
        __builtin_assume(__isGlobal(address));
#endif
        return address;
    }
};

// `count` elements of one tensor.
struct Chunk {
    int tensor;
    bool is_first;  // of its tensor
    int count;
    long long rest;  // elements of the tensor from here on
    const Grad::Storage* grad;
    Param::Storage* param;
    ExpAvg::Storage* exp_avg;
    Main::Storage* main;
    TensorScales scales;
};

ADAMS_FUNCTION Chunk chunk_at(const Table& table, long long index) {
    // Find the first tensor whose chunks end behind `index`. Tensors without elements have none.
    int low = 0, high = table.num_tensors - 1;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (Table::get(table, CHUNK_END, middle) > index) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    const int t = low;
    const long long begin = t == 0 ? 0 : Table::get(table, CHUNK_END, t - 1);
    const long long offset = (index - begin) * table.chunk_size;
    const long long rest = Table::get(table, NUMEL, t) - offset;

    Chunk chunk;
    chunk.tensor = t;
    chunk.is_first = index == begin;
    chunk.count = rest < table.chunk_size ? int(rest) : table.chunk_size;
    chunk.rest = rest;
    chunk.grad = Table::pointer<const Grad::Storage>(table, GRAD, t, offset);
    chunk.param = Table::pointer<Param::Storage>(table, PARAM, t, offset);
    chunk.exp_avg = Table::pointer<ExpAvg::Storage>(table, EXP_AVG, t, offset);
    chunk.main = has_main ? Table::pointer<Main::Storage>(table, MAIN, t, offset) : nullptr;
    chunk.scales = {1.0f, {1.0f, 1.0f}, {1.0f, 1.0f}, {1.0f, 1.0f}, {1.0f, 1.0f}, 1.0f};
    if (Param::is_fp8) {
        chunk.scales.param = *Table::pointer<const float>(table, PARAM_SCALE, t);
    }
    if (exp_avg_is_scaled) {
        chunk.scales.exp_avg_old.forward = *Table::pointer<const float>(table, EXP_AVG_SCALE, t);
        chunk.scales.exp_avg_new = scale_for(table.amax[t], largest_scaled<ExpAvg>);
    }
    if (main_is_scaled) {
        chunk.scales.main_old.forward = *Table::pointer<const float>(table, MAIN_SCALE, t);
        chunk.scales.main_new = scale_for(table.amax[table.num_tensors + t], largest_scaled<Main>);
    }
    if (is_guarded && Table::get(table, UPDATE_FACTOR, t) != 0) {
        chunk.scales.update = *Table::pointer<const float>(table, UPDATE_FACTOR, t);
    }
    return chunk;
}

// A tensor's first chunk writes this for the whole tensor.
ADAMS_FUNCTION void write_param_scale_inv(const Table& table, const Chunk& chunk) {
    if (Param::is_fp8) {
        *Table::pointer<float>(table, PARAM_SCALE_INV, chunk.tensor) = 1.0f / chunk.scales.param;
    }
}

// Merge the maxima of a part of a chunk into its tensor's. Reading first avoids most of the atomic
// operations.
ADAMS_FUNCTION void raise(int* address, int value) {
    if (value > *(volatile int*)address) atomic_max(address, value);
}
template <bool STORE>
ADAMS_FUNCTION void merge_amax(const Table& table, int tensor, const Amax& amax) {
    if (STORE) {
        if (Param::is_fp8) {
            raise(Table::pointer<int>(table, PARAM_AMAX, tensor), amax.param);
        }
    } else {
        if (exp_avg_is_scaled) raise(table.amax + tensor, amax.exp_avg);
        if (main_is_scaled) raise(table.amax + table.num_tensors + tensor, amax.main);
    }
}

// Add the squares of a part of a chunk to its tensor's sums.
ADAMS_FUNCTION void merge_squares(const Table& table, int tensor, const Squares& squares) {
    if (Table::get(table, UPDATE_SUM, tensor) == 0) return;
    long long* sums = Table::pointer<long long>(table, UPDATE_SUM, tensor);
    atomic_add(sums, squares.sum);
    if (squares.num_not_finite != 0) atomic_add(sums + 1, squares.num_not_finite);
}

// After all chunks are written, write the tensor's new scales, and set amax to zero for the next
// step.
ADAMS_FUNCTION void finish_tensor(const Table& table, int t) {
    if (exp_avg_is_scaled) {
        *Table::pointer<float>(table, EXP_AVG_SCALE, t) =
            scale_for(table.amax[t], largest_scaled<ExpAvg>).forward;
        table.amax[t] = 0;
    }
    if (main_is_scaled) {
        int& amax = table.amax[table.num_tensors + t];
        *Table::pointer<float>(table, MAIN_SCALE, t) =
            scale_for(amax, largest_scaled<Main>).forward;
        amax = 0;
    }
}

}  // namespace adams
