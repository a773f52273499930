// The maps of a feature pyramid, and the level that a box belongs to.

#pragma once

#include "roi_common.cuh"

namespace roi {

inline constexpr int kMaxLevels = 8;

// Maps (N, C, height, width) that share N, C and their memory format, finest first; one of them is a pyramid too.
// Kernels take it by value, so that one launch serves every level. The launch writes these bytes: see levels_struct() in
// launch.py.
template <typename T, typename Coord> struct Levels {
    T* data[kMaxLevels];
    Coord scale[kMaxLevels];  // cells of the map per unit of the boxes
    int height[kMaxLevels];
    int width[kMaxLevels];
    Coord canonical_scale;  // side of the boxes, in their units, that belong to
    Coord canonical_level;  // this level
    Coord finest_level;     // -log2 of the first scale, a whole number
    Coord coarsest_level;   // -log2 of the last scale, likewise
    int count;
};

// Lin et al., Feature Pyramid Networks (2017), equation 1, clamped to the first and the last map's level, as an index into
// Levels. A box without an area belongs to the first map. Where scales do not double, a box may belong to none: -1.
template <typename T, typename Coord>
__device__ __forceinline__ int level_of(const Levels<T, Coord>& levels, const Coord* box) {
    if (levels.count == 1) return 0;
    const Coord side = sqrt(multiply(box[3] - box[1], box[4] - box[2]));
    const Coord level = floor(levels.canonical_level + log2(side / levels.canonical_scale) + static_cast<Coord>(1e-6));
    // NaN, the root of a negative area, compares as false.
    const Coord known = level >= levels.finest_level ? level : levels.finest_level;
    const int index = static_cast<int>(min(known, levels.coarsest_level) - levels.finest_level);
    return index >= 0 && index < levels.count ? index : -1;
}

}  // namespace roi
