// Packs filled ahead of their consumer: one thread fills a fixed ring of buffers in order, and waits when it is full.
//
// The consumer takes packs in the same order. The last `keep` packs taken stay untouched; a ring of `keep + depth`
// buffers therefore lets the thread be `depth` packs ahead. An error while filling reaches the consumer in the place of
// the pack that failed, behind all packs before it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "collator.hpp"

namespace medmax {

// Pack `index` of the order, in buffer `slot` of the ring: what is not in the buffers themselves.
struct FilledPack {
    size_t index;
    size_t slot;
    int64_t ids;
    Boundaries boundaries;
    int64_t targets;
};

class Prefetcher {
public:
    using Fill = std::function<FilledPack(size_t index, size_t slot)>;

    // Starts filling packs 0 .. count - 1; `slots` > `keep` >= 1. `fill` runs on the thread only.
    Prefetcher(size_t count, size_t slots, size_t keep, Fill fill);
    ~Prefetcher();
    Prefetcher(const Prefetcher&) = delete;
    Prefetcher& operator=(const Prefetcher&) = delete;

    // Waits for the next pack and gives back the one taken `keep` calls ago; false after the last one and after
    // close(). Rethrows what `fill` threw, again on every further call.
    bool next(FilledPack& pack);

    // Stop after the pack in progress; the thread has ended when this returns.
    void close();

private:
    struct State;
    std::unique_ptr<State> state_;
};

// What the packs of a Prefetcher are made of: pack p of a plan is rows[offsets[p]] .. rows[offsets[p + 1] - 1], with
// weights beside rows (or null); those of order[0 .. count - 1] are filled, each into one of `slots`.
struct PackSource {
    const int64_t* rows;
    const float* weights;
    size_t num_rows;
    const int64_t* offsets;
    size_t num_packs;
    const int64_t* order;
    size_t count;
    int64_t max_length;
    int64_t length;
    LabelRule rule;
    int64_t pad;
    int threads;
};

struct PackSlot {
    PackedBuffers out;
    int32_t* cu_seqlens;
    size_t entries;
};

// The `fill` of a Prefetcher: pack_boundaries and fill_pack of one pack after the other, with their errors under the
// pack's number. Everything pointed to must outlive the Prefetcher.
template <typename Id>
Prefetcher::Fill pack_filler(const RowBuffer<Id>& store, const PackSource& source, std::vector<PackSlot> slots);

}  // namespace medmax
