"""Bounds that ``mutants.py`` does not change, because the kernel does the same where they are reached.

By file: the text with the bound as it would be (from the start of its line to the end of the next, spaces as one), how
many places read so, and why. Better is a source in which the bound cannot be wrong; what is left is listed here and
must not hide what could be.
"""

from __future__ import annotations

EXEMPT: dict[str, tuple[tuple[str, int, str], ...]] = {
    "attention.cu": (
        ("step.length || first <= oldest;", 1, "masks where no key is hidden: no score changes"),
        ("all_see_to || at <= all_see_from;", 1, "masks where no key is hidden: no score changes"),
        ("if (unit.count <= 0) return;", 1, "a unit has at least one query; -1 is none"),
        ("if (ROPE && begin <= end) {", 1, "without tiles, turned queries meet no key"),
    ),
    "attention_cache.cuh": (
        ("for (int distance = 1; distance <= 32; distance *= 2) {", 1, "no lane is 32 behind another"),
    ),
    "attention_decode.cuh": (
        ("for (int h = 0; h <= HALVES; ++h) { #pragma unroll", 1, "rows of a further half are past ROWS: skipped"),
        ("for (i32 c = 0; c <= count; c += FETCH) {", 1, "a batch from `count` on folds nothing"),
    ),
    "attention_lanes.cuh": (("= row <= count ? unit.word[j] : 0u;", 1, "a row that is no query is not stored"),),
    "attention_prefill.cuh": (
        ("const bool early = tid <= THREADS / 2;", 1, "one thread turns its share ahead of its warp"),
        ("if (ROPE && begin <= end) {", 1, "rotates a tile that is not multiplied"),
        ("stop <= start ||", 1, "no queries: stop - start is 0"),
        ("= begin + i <= end ? key_address(", 1, "the address of a tile that is not copied"),
        ("for (int i = 0; i <= STAGES - 1; ++i) { if (begin", 1, "one tile is copied twice, to the same stage"),
        ("if (begin + i <= end) copy_tile(staging, i);", 1, "a tile that is not multiplied"),
        ("for (int tile = begin; tile <= end; ++tile) {", 1, "no row sees a key of tile `end`: skipped"),
        ("if (tile + STAGES - 1 <= end) copy_tile(staging, before);", 1, "a tile that is not multiplied"),
        ("if (tid <= TILE && tile + STAGES < end) page", 1, "an address that is not stored"),
        ("tile + STAGES <= end) page", 1, "the address of a tile that is not copied"),
        ("const bool rotates = ROPE && tile + 1 <= end;", 1, "rotates a tile that is not multiplied"),
    ),
    "attention_prefill_bring.cuh": (
        ("blockIdx.x) <= most &&", 1, "there is no unit of that number"),
        ("more = number <= most &&", 1, "there is no unit of that number"),
        ("if (begin <= end) {", 1, "keys that nobody is told of, and that others overwrite"),
        ("if (tile + 1 <= end) {", 1, "keys that nobody is told of, and that others overwrite"),
        ("tiles.next(begin + 1 <= end);", 1, "the page of a tile that is not copied"),
        ("tiles.next(tile + 1 <= end);", 1, "the page of a tile that is not copied"),
        ("tiles.next(tile + 2 <= end);", 1, "the page of a tile that is not copied"),
    ),
    "attention_prefill_stream.cuh": (
        ("any && unit.begin <= unit.end;", 1, "the page of a tile that is not copied"),
        ("stop <= start ||", 1, "no queries: stop - start is 0"),
        ("for (int distance = 1; distance <= 32; distance *= 2) {", 1, "no lane is 32 behind another"),
    ),
    "attention_prefill_wgmma.cuh": (
        ("if (unit.count <= 0) break;", 1, "a unit has at least one query; -1 is none"),
        ("tile * TILE <= all_see_from;", 1, "masks where no key is hidden: no score changes"),
    ),
    "attention_schedule.cuh": (
        ("length <= 0 ? 0 : keys_of(length);", 1, "no tokens: no keys"),
        ("length <= 0 ? 0 : wanted(keys);", 1, "no keys ask for no slot"),
        ("for (int distance = 1; distance <= 32; distance *= 2) {", 1, "no lane is 32 behind another"),
    ),
    "attention_stage.cuh": (
        ("if (TURNERS <= THREADS &&", 2, "no thread has the number THREADS"),
        ("e <= count * PIECES; e += THREADS) {", 1, "the same thread's copy of a tile overwrites it"),
    ),
    "attention_stream.cuh": (
        ("if (open != 0 && tile * TILE <= length_) {", 1, "clears rows of a tile without keys"),
        ("lane < RUNS && rows <= RUN);", 1, "clears no row of a full run"),
    ),
    "attention_turn.cuh": (
        ("row <= count ? low : 0u);", 1, "a row that is no query is not stored"),
        ("row <= count ? high : 0u);", 1, "a row that is no query is not stored"),
    ),
    "lora.cu": (("for (int s = 1; s <= kSlices; ++s) {", 1, "no slice has the number kSlices"),),
    "lora_batch.cuh": (
        ("const bool places = thread <= kPlaced &&", 1, "the next block's first token, to its own place"),
        ("s <= 2 * slots; s += kThreads) count[s] = 0;", 1, "base[0], which is written before it is read"),
        ("start <= stop) {", 1, "adds an empty segment"),
        ("if (start <= first) atomicAdd(before", 1, "adds 0"),
        ("start <= tokens; start += kInFlight * kThreads) {", 1, "tokens from `tokens` on are not read"),
        ("if (thread <= kPlaced) mine[thread] = slot;", 1, "scan[0], which is written before it is read"),
        ("for (int step = 1; step <= 32; step *= 2) {", 1, "no lane is 32 behind another"),
    ),
    "lora_config.cuh": (("i <= rows && chosen < tokens)", 1, "row 0 once more, from the same y: the same bits"),),
    "lora_direct.cuh": (
        ("start <= kSteps; start += kStepsAt) {", 1, "steps from kSteps on are not taken"),
        ("advance(start + kStepsAt <= kSteps ? kStepsAt", 1, "the two are equal where the bound is met"),
    ),
    "lora_exchange.cuh": (
        ("for (int i = 0; i <= count; ++i) ptx::mbarrier_init(", 1, "one barrier more, in room kept for 16"),
        ("first <= 8 * kWidth / 4; first += kThreads) {", 1, "token 8 and on: not below `rows`"),
        ("first <= kQuads * kSenders; first += kThreads) {", 1, "sender kSenders and on: not below kSenders"),
        ("first <= kQuads; first += kThreads) {", 2, "quad kQuads and on: not below `quads`, and in no share"),
    ),
    "lora_expand.cuh": (
        ("for (int j = 0; j <= S::kYChunks / 4; ++j) { const int row", 1, "row 8 and on: not below `rows`"),
        ("row <= rows && (kWhole", 1, "a row of y that is safe to read and not written"),
        ("first <= rank + run * t; first += 4 * run) {", 1, "ranks from `rank` on count as zeros"),
        ("part[i] = 4 * s + i <= run &&", 1, "times a zero: B has no more than `run` ranks here"),
    ),
    "lora_halves.cuh": (
        ("at + 1 <= kRank ?", 1, "`at` and kRank are multiples of 4"),
        ("at + 2 <= kRank ?", 1, "`at` and kRank are multiples of 4"),
        ("at + 3 <= kRank ?", 1, "`at` and kRank are multiples of 4"),
    ),
    "lora_math.cuh": (("for (int bit = 0; bit <= kLevels; ++bit) {", 1, "a leaf's number has kLevels bits"),),
    "lora_ring.cuh": (
        ("row <= tile.rows)) wanted", 1, "a row of x whose products are not written"),
        ("y_row + j * kThreads / kYChunks <= tile.rows &&", 1, "a row of y that is not written"),
    ),
    "metadata.cu": (
        ("i <= base + CHUNK; i += BLOCK) to[i]", 1, "an element of the next chunk, to its own place"),
        ("* CHUNK) <= n;) {", 1, "elements from n on are not copied"),
        ("if (n <= 0) n = 0;", 1, "0 stays 0"),
        ("} while (at <= n);", 1, "a round without an element"),
        ("for (int k = 0; k <= ITEMS; ++k) {", 3, "item ITEMS is not below `left`, which is at most ROW_CHUNK"),
        ("length <= 0 ? -length : 0;", 1, "-0 is 0"),
    ),
    "norm.cu": (
        ("for (int i = 0; i <= PER_VEC; ++i) { if (i < n) {", 3, "n is at most PER_VEC"),
        ("for (int first = BEGIN; first <= END; first += 4) {", 1, "vectors from END on are not taken"),
        ("for (int span = 1; span <= WARPS; span *= 2) {", 1, "no part is WARPS behind another"),
    ),
    "paged_kv.cu": (
        ("while (left + (begin + left <= batch) > 32) {", 1, "one step more, which finds the same"),
        ("begin + lane <= batch && end <= token;", 1, "counts the last sequence twice: the token is behind all"),
        ("(owner <= 32);", 1, "owner 32: lane 0 answers, whose sequence ends before the token"),
    ),
}
