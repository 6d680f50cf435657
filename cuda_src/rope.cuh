// Rotary embedding: the pair of elements d and d + DIM / 2 of a row turns by an angle in proportion to its position.
#pragma once
#include "common.cuh"

template <int PAIRS>
struct Frequencies {
    double turns[PAIRS];  // of a full circle, per position
};

// (cos, sin) of a pair's angle at a position. In float64 up to the fraction of a turn, so that the angle of position
// 1,000,000 is as exact as that of position 1; the rest, within half a turn, in float32.
CUPY_LORA_DEVICE float2 angle_at(double turns_per_position, i64 position) {
    const double turns = static_cast<double>(position) * turns_per_position;
    float sine, cosine;
    sincospif(static_cast<float>(2.0 * (turns - rint(turns))), &sine, &cosine);
    return make_float2(cosine, sine);
}
