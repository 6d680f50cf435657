// The arithmetic of every LoRA kernel, in one place, so that all of them give the same bits.
//
//   v = x A^T         x (tokens, K), A (rank, K), in 16 bits; float32 sums
//   y = y + (scale v) B^T   B (N, rank) in 16 bits; scale v kept at float32 accuracy; y rounded once
//
// Order of the sums, fixed for the library:
// - K is cut into 64 leaves of 32 * ceil(K / 2048) columns; a leaf is summed by consecutive k16 tensor
//   core products, the leaves by a binary tree of float32 additions. Leaves past K are zeros.
// - y's accumulators start from y and take the rank in k16 blocks, each as the split v's terms, smallest first.
// Hence a row's bits depend on the row, its adapter and the layer's shape: not on the number of
// blocks or warps that shared the work, the tile it was in, or which kernel computed it.
//
// Fragments come straight from 16-byte accesses: k is permuted, alike on both sides. Lane (g, t) of a
// warp, g = lane / 4, t = lane % 4, holds columns 8t to 8t + 7 of each 32; the same for the rank, in runs
// of 2, 4 or 8 as it is up to 8, up to 16, or more.
#pragma once

#include "common.cuh"

constexpr int kLeaves = 64;

template <int K>
struct Leaf {
    static constexpr int kSteps = ceil_div(K, 2048);  // of 32 columns
    static constexpr int kColumns = 32 * kSteps;
    static constexpr bool kExact = K == kLeaves * kColumns;  // no leaf reaches past K
};

// Contiguous ranks that one lane holds of each 4 * kRun, as a function of the rank alone.
constexpr CUPY_LORA_DEVICE int rank_run(int rank) { return rank <= 8 ? 2 : rank <= 16 ? 4 : 8; }

constexpr CUPY_LORA_DEVICE int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// The power of two at or below n; 0 for 0.
constexpr CUPY_LORA_DEVICE int floor_power(int n) { return n <= 1 ? n : 2 * floor_power(n / 2); }

// ---- the tree over leaves ------------------------------------------------------------------------
CUPY_LORA_DEVICE float4 add4(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// load(first) + ... + load(first + N - 1) as a balanced binary tree; N a power of two.
template <int N, class Load>
CUPY_LORA_DEVICE float4 tree_sum(const Load& load, int first = 0) {
    if constexpr (N == 1) {
        return load(first);
    } else {
        return add4(tree_sum<N / 2>(load, first), tree_sum<N / 2>(load, first + N / 2));
    }
}

// The same tree fed one leaf after another: push(leaf) for 0, 1, ... with compile-time indices after
// unrolling, so that the pending subtrees stay in registers.
template <int kLeafCount, int kBlocks, int kGroups = 1>
struct Tree {
    static constexpr int kLevels = log2_of(kLeafCount);
    float pending[kLevels + 1][kBlocks][kGroups][4];

    CUPY_LORA_DEVICE void push(int leaf, float (&value)[kBlocks][kGroups][4]) {
        int level = 0;
#pragma unroll
        for (int bit = 0; bit < kLevels; ++bit) {
            if (level == bit && ((leaf >> bit) & 1)) {
                each([&](int b, int m, int e) { value[b][m][e] = pending[bit][b][m][e] + value[b][m][e]; });
                ++level;
            }
        }
#pragma unroll
        for (int at = 0; at <= kLevels; ++at) {
            if (at == level) each([&](int b, int m, int e) { pending[at][b][m][e] = value[b][m][e]; });
        }
    }

    // The same with an index known at run time only.
    template <int kLevel = 0>
    CUPY_LORA_DEVICE void push_at(int leaf, float (&value)[kBlocks][kGroups][4]) {
        if constexpr (kLevel < kLevels) {
            if (leaf >> kLevel & 1) {
                each([&](int b, int m, int e) { value[b][m][e] = pending[kLevel][b][m][e] + value[b][m][e]; });
                push_at<kLevel + 1>(leaf, value);
                return;
            }
        }
        each([&](int b, int m, int e) { pending[kLevel][b][m][e] = value[b][m][e]; });
    }

    CUPY_LORA_DEVICE float total(int b, int m, int e) const { return pending[kLevels][b][m][e]; }

    template <class F>
    static CUPY_LORA_DEVICE void each(const F& f) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
            for (int m = 0; m < kGroups; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e) f(b, m, e);
    }
};

// The 16-row operand of a product, from two rows' words. The assembler takes moves into neighbouring registers for
// free to repeat, and repeats them ahead of every product (more than half of all instructions of a prefill were
// such moves); it keeps what it had to compute, so a zero that it does not know is added: every block is one row of
// threads.
struct Rows16 {
    u32 word[4];

    Rows16() = default;
    CUPY_LORA_DEVICE Rows16(u32 even_low, u32 odd_low, u32 even_high, u32 odd_high) {
        const u32 zero = threadIdx.z;
        word[0] = even_low | zero, word[1] = odd_low | zero, word[2] = even_high | zero, word[3] = odd_high | zero;
    }
};

// One step of 32 columns of the shrink: 16 ranks (rows g and g + 8 of A) by kGroups groups of 8 tokens (rows g of x).
template <class T, int kGroups>
CUPY_LORA_DEVICE void shrink_step(float (&sum)[kGroups][4], uint4 a_low, uint4 a_high, const uint4 (&x)[kGroups]) {
    const Rows16 first(a_low.x, a_high.x, a_low.y, a_high.y), second(a_low.z, a_high.z, a_low.w, a_high.w);
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
        ptx::mma_m16n8k16(sum[m], first.word[0], first.word[1], first.word[2], first.word[3], x[m].x, x[m].y, T{});
    }
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
        ptx::mma_m16n8k16(sum[m], second.word[0], second.word[1], second.word[2], second.word[3], x[m].z, x[m].w, T{});
    }
}

// ---- v, split so that a 16-bit tensor core product keeps it at float32 accuracy --------------------
// bf16: three bf16 terms (8 bits each). Two would leave 2e-3 of the outputs rounded the other way than
// the exact result, three leave 2e-4, as float32 does.
// f16: B is widened to tf32, which holds it exactly, and v becomes two tf32 terms (11 bits each): three
// f16 terms would overflow above 65504 and lose bits below 1e-3.
template <class T>
struct SplitV;

template <>
struct SplitV<bf16> {
    u32 term[3][2];  // [largest first][ranks 0, 1 | ranks 2, 3 of the lane's four]

    CUPY_LORA_DEVICE void set(float4 v) {
        split(v.x, v.y, 0);
        split(v.z, v.w, 1);
    }
    CUPY_LORA_DEVICE void split(float low, float high, int pair) {
#pragma unroll
        for (int z = 0; z < 3; ++z) {
            const u32 word = pack2(low, high, bf16{});
            term[z][pair] = word;
            float taken_low, taken_high;
            unpack2(word, taken_low, taken_high, bf16{});
            low -= taken_low;
            high -= taken_high;
        }
    }
};

template <>
struct SplitV<f16> {
    float term[2][4];

    CUPY_LORA_DEVICE void set(float4 v) {
        const float part[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            term[0][i] = ptx::tf32_from_float(part[i]);
            term[1][i] = ptx::tf32_from_float(part[i] - term[0][i]);
        }
    }
};

// B as the 16-row operand of a k16 block of the expand: 16 columns of y (two rows of B: `even` is row g, `odd` row
// g + 8, each the lane's four ranks). expand_step: its products with 8 tokens.
template <class T>
struct ColumnsOfB;

template <>
struct ColumnsOfB<bf16> {
    Rows16 rows;

    CUPY_LORA_DEVICE void set(const u32 (&even)[2], const u32 (&odd)[2]) {
        rows = Rows16(even[0], odd[0], even[1], odd[1]);
    }
};

template <>
struct ColumnsOfB<f16> {
    float a[2][4];

    CUPY_LORA_DEVICE void set(const u32 (&even)[2], const u32 (&odd)[2]) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            unpack2(even[pair], a[pair][0], a[pair][2], f16{});
            unpack2(odd[pair], a[pair][1], a[pair][3], f16{});
        }
    }
};

CUPY_LORA_DEVICE void expand_step(float (&sum)[4], const ColumnsOfB<bf16>& b, const SplitV<bf16>& v) {
#pragma unroll
    for (int z = 2; z >= 0; --z) {
        const u32(&w)[4] = b.rows.word;
        ptx::mma_m16n8k16(sum, w[0], w[1], w[2], w[3], v.term[z][0], v.term[z][1], bf16{});
    }
}

CUPY_LORA_DEVICE void expand_step(float (&sum)[4], const ColumnsOfB<f16>& b, const SplitV<f16>& v) {
#pragma unroll
    for (int z = 1; z >= 0; --z) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            ptx::mma_m16n8k8_tf32(sum, b.a[pair][0], b.a[pair][1], b.a[pair][2], b.a[pair][3], v.term[z][2 * pair],
                                  v.term[z][2 * pair + 1]);
        }
    }
}

// The same sums with v as the 16-row operand: tokens g (`even`) and g + 8 (`odd`) by 8 columns of y, of which
// `b` is row g of B, the lane's four ranks. v's operand is made once for all columns.
CUPY_LORA_DEVICE void expand_step(float (&sum)[4], const u32 (&b)[2], const SplitV<bf16>& even,
                                  const SplitV<bf16>& odd) {
#pragma unroll
    for (int z = 2; z >= 0; --z) {
        ptx::mma_m16n8k16(sum, even.term[z][0], odd.term[z][0], even.term[z][1], odd.term[z][1], b[0], b[1], bf16{});
    }
}

CUPY_LORA_DEVICE void expand_step(float (&sum)[4], const u32 (&b)[2], const SplitV<f16>& even, const SplitV<f16>& odd) {
    float low[2], high[2];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) unpack2(b[pair], low[pair], high[pair], f16{});
#pragma unroll
    for (int z = 1; z >= 0; --z) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            ptx::mma_m16n8k8_tf32(sum, even.term[z][2 * pair], odd.term[z][2 * pair], even.term[z][2 * pair + 1],
                                  odd.term[z][2 * pair + 1], low[pair], high[pair]);
        }
    }
}

// Four ranks of a lane (the s-th of its kRun) from its loads of B, for 16 columns of y.
template <int kRun, class T>
CUPY_LORA_DEVICE ColumnsOfB<T> columns_of_b(const u32 (&b)[2][kRun / 2], int s) {
    u32 even[2] = {b[0][2 * s], 0}, odd[2] = {b[1][2 * s], 0};
    if constexpr (kRun > 2) even[1] = b[0][2 * s + 1], odd[1] = b[1][2 * s + 1];
    ColumnsOfB<T> columns;
    columns.set(even, odd);
    return columns;
}

// The ranks of one load of B, 4 * kRun of them, for 16 * kPairs columns of y.
template <int kRun, int kPairs, class T>
CUPY_LORA_DEVICE void expand_group(float (&sum)[kPairs][4], const u32 (&b)[kPairs][2][kRun / 2],
                                   const SplitV<T> (&v)[kRun > 4 ? 2 : 1]) {
#pragma unroll
    for (int s = 0; s < (kRun > 4 ? 2 : 1); ++s) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) expand_step(sum[i], columns_of_b<kRun, T>(b[i], s), v[s]);
    }
}

// The lane's ranks of the split v: first + kRun * t on, from v_quad(rank) (four floats, rank a multiple of 4).
template <int kRun, class T, class VQuad>
CUPY_LORA_DEVICE void split_v(SplitV<T> (&v)[kRun > 4 ? 2 : 1], int first, const VQuad& v_quad) {
    const int t = threadIdx.x % 4;
    if constexpr (kRun == 2) {
        float4 quad = v_quad(first + 2 * t / 4 * 4);
        if (t % 2) quad.x = quad.z, quad.y = quad.w;
        quad.z = quad.w = 0.f;
        v[0].set(quad);
    } else if constexpr (kRun == 4) {
        v[0].set(v_quad(first + 4 * t));
    } else {
        v[0].set(v_quad(first + 8 * t));
        v[1].set(v_quad(first + 8 * t + 4));
    }
}

// ---- loads of runs of elements -----------------------------------------------------------------
// kRun 16-bit elements from `p` into words; those at `valid` and beyond are zeros and not read.
// kVector: elements per access that the address allows (a power of two); kStride: between elements.
template <int kRun, int kVector, class T>
CUPY_LORA_DEVICE void load_run(u32 (&words)[kRun / 2], const T* p, int valid, i64 stride = 1) {
    if constexpr (kVector >= kRun) {
#pragma unroll
        for (int i = 0; i < kRun / 2; ++i) words[i] = 0;
        if (valid >= kRun) {
            if constexpr (kRun == 8) {
                const uint4 w = ptx::load_once_16(p);
                words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
            } else if constexpr (kRun == 4) {
                const uint2 w = ptx::load_once_8(p);
                words[0] = w.x, words[1] = w.y;
            } else {
                words[0] = __ldg(reinterpret_cast<const u32*>(p));
            }
        }
    } else if constexpr (kVector > 1) {  // `valid` is even: so is the rank
#pragma unroll
        for (int i = 0; i < kRun / 2; ++i) words[i] = 2 * i < valid ? __ldg(reinterpret_cast<const u32*>(p) + i) : 0;
    } else {
#pragma unroll
        for (int i = 0; i < kRun / 2; ++i) {
            u32 low = 0, high = 0;
            if (2 * i < valid) low = p[(2 * i) * stride].bits;
            if (2 * i + 1 < valid) high = p[(2 * i + 1) * stride].bits;
            words[i] = low | high << 16;
        }
    }
}

// 8 columns of a row of x or A. kStays: by a strong load, which stays where it stands; the assembler moves a weak one
// to where it is needed, behind the wait for another load or behind copies that are needed later.
template <bool kVectors, bool kStays = false, class T>
CUPY_LORA_DEVICE uint4 load_columns(const T* p, int valid, i64 stride = 1) {
    if constexpr (kVectors && kStays) {
        float4 w = make_float4(0.f, 0.f, 0.f, 0.f);
        if (valid >= 8) w = ptx::load_fresh_16(reinterpret_cast<const float*>(p));
        return make_uint4(__float_as_uint(w.x), __float_as_uint(w.y), __float_as_uint(w.z), __float_as_uint(w.w));
    } else {
        u32 w[4];
        load_run<8, kVectors ? 8 : 1>(w, p, valid, stride);
        return make_uint4(w[0], w[1], w[2], w[3]);
    }
}

// kCount (2, 4 or 8) neighbouring elements of a row of y, raw until they are used. kVectors: moved by the
// widest access that fits, all or none of them; else one by one, up to `valid`.
template <class T, int kCount, bool kVectors>
struct Columns {
    static constexpr int kPairs = kCount / 2;
    u32 words[kPairs];

    CUPY_LORA_DEVICE void load(const T* p, int valid) {
        if constexpr (!kVectors) {
            load_run<kCount, 1>(words, p, valid);
        } else if (valid >= kCount) {
            if constexpr (kPairs == 4) {
                const uint4 w = *reinterpret_cast<const uint4*>(p);
                words[0] = w.x, words[1] = w.y, words[2] = w.z, words[3] = w.w;
            } else if constexpr (kPairs == 2) {
                const uint2 w = *reinterpret_cast<const uint2*>(p);
                words[0] = w.x, words[1] = w.y;
            } else {
                words[0] = *reinterpret_cast<const u32*>(p);
            }
        }
    }

    CUPY_LORA_DEVICE void get(int pair, float& low, float& high) const { unpack2(words[pair], low, high, T{}); }
    CUPY_LORA_DEVICE void set(int pair, float low, float high) { words[pair] = pack2(low, high, T{}); }

    CUPY_LORA_DEVICE void store(T* p, int valid) const {
        if constexpr (!kVectors) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                if (i < valid) p[i] = T{static_cast<u16>(words[i / 2] >> (16 * (i % 2)))};
            }
        } else if (valid >= kCount) {
            if constexpr (kPairs == 4) {
                *reinterpret_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
            } else if constexpr (kPairs == 2) {
                *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
            } else {
                *reinterpret_cast<u32*>(p) = words[0];
            }
        }
    }
};

template <int kCount, bool kVectors>
struct Columns<float, kCount, kVectors> {
    static constexpr int kPairs = kCount / 2;
    float2 pairs[kPairs];

    CUPY_LORA_DEVICE void load(const float* p, int valid) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if constexpr (kVectors) {
                if (valid >= kCount) pairs[i] = *reinterpret_cast<const float2*>(p + 2 * i);
            } else {
                if (2 * i < valid) pairs[i].x = p[2 * i];
                if (2 * i + 1 < valid) pairs[i].y = p[2 * i + 1];
            }
        }
    }

    CUPY_LORA_DEVICE void get(int pair, float& low, float& high) const { low = pairs[pair].x, high = pairs[pair].y; }
    CUPY_LORA_DEVICE void set(int pair, float low, float high) { pairs[pair] = make_float2(low, high); }

    CUPY_LORA_DEVICE void store(float* p, int valid) const {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if constexpr (kVectors) {
                if (valid >= kCount) *reinterpret_cast<float2*>(p + 2 * i) = pairs[i];
            } else {
                if (2 * i < valid) p[2 * i] = pairs[i].x;
                if (2 * i + 1 < valid) p[2 * i + 1] = pairs[i].y;
            }
        }
    }
};
