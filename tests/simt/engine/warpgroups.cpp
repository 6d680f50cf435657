// Warpgroup matrix products, and named barriers.
//
// A product is done at the wait that forces it (or at once, Config.early), each warp's 16 rows at that warp's own wait:
// until then its accumulators hold NaN. Matrices in shared memory are read as their descriptors say, bit by bit.
#include "engine.h"

namespace simt {

// ---- named barriers
void named_barrier(int number, int count, bool waits) {
    Block& b = *current->block;
    if (number < 1 || number > 15) fail("a named barrier has a number from 1 to 15, not %d", number);
    if (count % WARP || count < 1) fail("named barrier %d: %d threads are no whole warps", number, count);
    Named& n = b.named[number];
    if (n.arrived == 0) n.count = count;
    if (n.count != count) fail("named barrier %d: %d threads here, %d elsewhere", number, count, n.count);
    tell_times(n.told);
    if (++n.arrived < count) {
        if (!waits) return;
        current->mbarrier = &n;
        park(IN_NAMED, "a named barrier");
    } else {
        bool awaited = waits;
        for (const Fiber& f : b.fibers) awaited |= f.wait == IN_NAMED && f.mbarrier == &n;
        if (!awaited) fail("named barrier %d: all arrive and nobody waits", number);
        n.arrived = 0;
        n.seen.swap(n.told), n.told.clear();
        for (Fiber& f : b.fibers)
            if (f.wait == IN_NAMED && f.mbarrier == &n) learn(f.seen, n.seen), wake(f);
        if (waits) learn(current->seen, n.seen);
    }
}

// ---- matrices in shared memory
void proxy_fence() { current->fenced = true; }
unsigned shared_address(const void* p) {
    own(p, 1, "shared_address");
    return static_cast<unsigned>(static_cast<const unsigned char*>(p) - current->block->pages);
}

// The bytes of a matrix of rows of 128 bytes whose 16-byte pieces are permuted.
struct Matrix {
    const unsigned char* base;  // at the start address
    size_t leading, stride;

    Matrix(unsigned long long descriptor, const char* what) {
        const auto field = [&](unsigned bit) { return static_cast<size_t>(descriptor >> bit & 0x3fff) * 16; };
        if (descriptor >> 62 != 1) fail("%s: expected the permutation of 128-byte rows in its descriptor", what);
        if (descriptor & 0x3fffc000c000c000u) fail("%s: bits of its descriptor that must be 0 are not", what);
        base = current->block->pages + field(0);
        leading = field(16), stride = field(32);
        if ((reinterpret_cast<uintptr_t>(base) & 1023) >= 128)
            fail("%s: %p is not in the first row of 8 that start at a multiple of 1024", what, base);
    }
    // Of 8 elements, 16 bytes.
    const unsigned short* piece(size_t offset) const {
        auto at = reinterpret_cast<uintptr_t>(base) + offset;
        at ^= (at >> 7 & 7) << 4;
        const auto* const p = reinterpret_cast<const unsigned short*>(at);
        own(p, 16, "wgmma");
        access(p, 16, false);
        return p;
    }
    const unsigned short* along_k(unsigned row, unsigned k) const {
        return piece(row / 8 * stride + row % 8 * 128 + k * 2);
    }
    const unsigned short* across_k(unsigned k, unsigned column) const {
        return piece(column / 64 * leading + column % 64 * 2 + k / 8 * stride + k % 8 * 128);
    }
};

// ---- products
static void multiply_group(Warp& w, Product& p) {
    const auto value = [&](unsigned short bits) { return p.is_bf16 ? float_from_bf16(bits) : float_from_f16(bits); };
    const unsigned warp = w.fibers->tid / WARP % 4, columns = p.eights * 8;
    double a[16][16];
    static double b[16][256];
    // The product is the warpgroup's: what it may read at this time is all 64 rows.
    for (unsigned row = 0; row < 64 && p.a_shared; ++row)
        for (unsigned k = 0; k < 16; k += 8) Matrix(p.a_matrix, "wgmma, first matrix").along_k(row, k);
    for (unsigned row = 0; row < 16 && p.a_shared; ++row)
        for (unsigned k = 0; k < 16; k += 8) {
            const unsigned short* const from = Matrix(p.a_matrix, "wgmma, first matrix").along_k(warp * 16 + row, k);
            for (unsigned i = 0; i < 8; ++i) a[row][k + i] = value(from[i]);
        }
    for (unsigned lane = 0; lane < WARP && !p.a_shared; ++lane)
        for (unsigned i = 0; i < 8; ++i)
            a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
                value(static_cast<unsigned short>(p.a[lane][i / 2] >> i % 2 * 16));
    const Matrix right(p.b_matrix, "wgmma, second matrix");
    if (p.a_shared) {
        for (unsigned column = 0; column < columns; ++column)
            for (unsigned k = 0; k < 16; k += 8) {
                const unsigned short* const from = right.along_k(column, k);
                for (unsigned i = 0; i < 8; ++i) b[k + i][column] = value(from[i]);
            }
    } else {
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned column = 0; column < columns; column += 8) {
                const unsigned short* const from = right.across_k(k, column);
                for (unsigned i = 0; i < 8; ++i) b[k][column + i] = value(from[i]);
            }
    }
    std::vector<float>& sums = *p.sums;
    for (unsigned row = 0; row < 16; ++row) {
        double line[256] = {};
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned column = 0; column < columns; ++column) line[column] += a[row][k] * b[k][column];
        for (unsigned column = 0; column < columns; ++column) {
            const unsigned lane = row % 8 * 4 + column % 8 / 2, i = column / 8 * 4 + row / 8 * 2 + column % 2;
            float& sum = sums[lane * p.eights * 4 + i];
            sum = static_cast<float>(line[column] + (p.add ? static_cast<double>(sum) : 0.0));
        }
    }
}

// The products of the groups before `groups` are done; accumulators that nothing is under way to any more get them.
static void finish_products(Warp& w, unsigned groups) {
    while (!w.products.empty() && w.products.front().group < groups) {
        multiply_group(w, w.products.front());
        w.products.erase(w.products.begin());
    }
    for (auto s = w.sums.begin(); s != w.sums.end();) {
        bool open = false;
        for (const Product& p : w.products) open |= p.sums == &s->values;
        if (open) {
            ++s;
            continue;
        }
        for (unsigned lane = 0; lane < WARP; ++lane)
            for (unsigned j = 0; j < s->eights * 4; ++j) {
                if (simt_bits<unsigned>(s->at[lane][j]) != UNDER_WAY)
                    fail("wgmma: accumulator %u of lane %u was written before its product was waited for", j, lane);
                s->at[lane][j] = s->values[lane * s->eights * 4 + j];
            }
        s = w.sums.erase(s);
    }
}

static void issue(void* const* data, unsigned) {
    Warp& w = *current->warp;
    const Issue& first = *static_cast<Issue*>(data[0]);
    Product p = {first.eights, w.product_group, first.a == nullptr, first.is_bf16, first.add,
                 {},           first.a_matrix,  first.b_matrix,     nullptr};
    if (!w.ordered) fail("wgmma: without wgmma_fence after accumulators were last used");
    for (unsigned lane = 0; lane < WARP; ++lane) {
        const Issue& one = *static_cast<Issue*>(data[lane]);
        if (one.a_matrix != p.a_matrix || one.b_matrix != p.b_matrix || one.add != p.add)
            fail("wgmma: lane %u has other descriptors than lane 0", lane);
        if (!w.fibers[lane].fenced) fail("wgmma: lane %u has not called wgmma_fence_shared since a barrier", lane);
        for (unsigned i = 0; i < 4 && one.a; ++i) p.a[lane][i] = one.a[i];
    }
    // All four warps of a warpgroup make the same products.
    std::vector<std::pair<unsigned long long, unsigned long long>>& all =
        current->block->issued[current->tid / WARP / 4];
    if (w.issued == all.size()) all.push_back({p.a_matrix, p.b_matrix});
    if (all[w.issued] != std::make_pair(p.a_matrix, p.b_matrix))
        fail("wgmma: another warp of the warpgroup made another product at this place");
    ++w.issued;
    Sums* sums = nullptr;
    for (Sums& s : w.sums)
        if (s.at[0] == first.c) sums = &s;
    if (!sums) {
        w.sums.emplace_back();
        sums = &w.sums.back();
        sums->eights = p.eights;
        for (unsigned lane = 0; lane < WARP; ++lane) {
            float* const c = sums->at[lane] = static_cast<Issue*>(data[lane])->c;
            sums->values.insert(sums->values.end(), c, c + p.eights * 4);
            for (unsigned j = 0; j < p.eights * 4; ++j) c[j] = simt_bits<float>(UNDER_WAY);
        }
    }
    if (sums->eights != p.eights) fail("wgmma: products of different widths to the same accumulators");
    p.sums = &sums->values;
    w.products.push_back(p);
    config->used_async = 1;
    if (config->early) finish_products(w, w.product_group + 1);
}

void wgmma(float* c, int eights, const unsigned* a, unsigned long long a_matrix, unsigned long long b_matrix, bool add,
           bool is_bf16, int line) {
    Issue one = {c, static_cast<unsigned>(eights), a, a_matrix, b_matrix, add, is_bf16};
    meet(~0u, "wgmma", line, &one, issue);
}
void wgmma_fence(int line) {
    meet(~0u, "wgmma.fence", line, current, [](void* const*, unsigned) { current->warp->ordered = true; });
}
void wgmma_commit(int line) {
    meet(~0u, "wgmma.commit_group", line, current, [](void* const*, unsigned) { ++current->warp->product_group; });
}
void wgmma_wait(unsigned allowed, int line) {
    meet(~0u, "wgmma.wait_group", line, &allowed, [](void* const* data, unsigned) {
        Warp& w = *current->warp;
        const unsigned left = *static_cast<unsigned*>(data[current->lane]);
        if (w.product_group > left) finish_products(w, w.product_group - left);
        w.ordered = false;
    });
}
void check_products(const Block& b) {
    for (size_t i = 0; i < b.warps.size(); ++i) {
        if (!b.warps[i].products.empty()) fail("wgmma: warp %zu exited with products under way", i);
        if (b.warps[i].issued != b.issued[i / 4].size())
            fail("wgmma: warp %zu took part in %zu of its warpgroup's %zu products", i, b.warps[i].issued,
                 b.issued[i / 4].size());
    }
}

}  // namespace simt
