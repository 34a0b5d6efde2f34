#include "balance.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "planner.hpp"

namespace medmax {
namespace {

__extension__ typedef __int128 Wide;

// Ids and squared row lengths of a pack or of a rank's share, in 1/65536 of the mean pack.
struct Load {
    int64_t ids = 0;
    int64_t squares = 0;

    int64_t sum() const { return ids + squares; }
    Load operator+(const Load& other) const { return {ids + other.ids, squares + other.squares}; }
    Load operator-(const Load& other) const { return {ids - other.ids, squares - other.squares}; }
    Wide dot(const Load& other) const { return Wide{ids} * other.ids + Wide{squares} * other.squares; }
};

std::vector<Load> pack_loads(const PlannedRows& plan) {
    const size_t packs = plan.num_packs;
    std::vector<Load> loads(packs);
    Wide ids = 0, squares = 0;
    for (size_t pack = 0; pack < packs; ++pack) {
        const int64_t begin = plan.offsets[pack], end = plan.offsets[pack + 1];
        if (begin < 0 || end < begin || static_cast<size_t>(end) > plan.num_rows) {
            throw std::out_of_range("pack " + std::to_string(pack) + " lies outside the rows of the plan");
        }
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = plan.rows[i];
            if (row < 0 || static_cast<size_t>(row) >= plan.num_lengths) {
                throw std::out_of_range("row " + std::to_string(row) + ", expected 0.." +
                                        std::to_string(plan.num_lengths) + " (exclusive)");
            }
            const int64_t length = plan.lengths[row];
            // Also keeps the sums below 2^48.
            if (length < 0 || length > kMaxCapacity - loads[pack].ids) {
                throw std::invalid_argument("pack " + std::to_string(pack) + ", row " + std::to_string(row) +
                                            ": length " + std::to_string(length) + ", expected rows of 0 or more and " +
                                            std::to_string(kMaxCapacity) + " in all");
            }
            loads[pack].ids += length;
            loads[pack].squares += length * length;
        }
        ids += loads[pack].ids;
        squares += loads[pack].squares;
    }
    const Wide unit = Wide{65536} * static_cast<Wide>(packs);
    for (Load& load : loads) {
        if (ids > 0) load.ids = static_cast<int64_t>(load.ids * unit / ids);
        if (squares > 0) load.squares = static_cast<int64_t>(load.squares * unit / squares);
    }
    return loads;
}

// Deals the packs of one step after another; `ranks` holds what each rank has so far.
class Dealer {
public:
    Dealer(size_t packs_per_step, size_t world) : costs_(packs_per_step), slots_(packs_per_step), ranks_(world) {
        order_.resize(world);
    }

    // Place of each pack by slot, micro-step * world + rank, for a step of the `count` packs at `loads`.
    const std::vector<int32_t>& deal(const Load* loads, size_t count) {
        std::copy(loads, loads + count, costs_.begin());
        std::fill(costs_.begin() + static_cast<ptrdiff_t>(count), costs_.end(), Load{});
        std::iota(slots_.begin(), slots_.end(), 0);
        std::stable_sort(slots_.begin(), slots_.end(),
                         [&](int32_t a, int32_t b) { return cost(a).sum() > cost(b).sum(); });
        const size_t world = ranks_.size();
        std::vector<int32_t> sorted(world);
        for (size_t first = 0; first < slots_.size(); first += world) {
            std::iota(order_.begin(), order_.end(), size_t{0});
            std::stable_sort(order_.begin(), order_.end(),
                             [&](size_t a, size_t b) { return ranks_[a].sum() < ranks_[b].sum(); });
            std::copy_n(slots_.begin() + static_cast<ptrdiff_t>(first), world, sorted.begin());
            for (size_t i = 0; i < world; ++i) {
                slots_[first + order_[i]] = sorted[i];
                ranks_[order_[i]] = ranks_[order_[i]] + cost(sorted[i]);
            }
        }
        for (int round = 0; round < kTradeRounds && trade(); ++round) {
        }
        return slots_;
    }

private:
    const Load& cost(int32_t place) const { return costs_[static_cast<size_t>(place)]; }

    // One round over all pairs of ranks in all micro-steps; whether any two have traded.
    bool trade() {
        bool traded = false;
        const size_t world = ranks_.size();
        for (size_t first = 0; first < slots_.size(); first += world) {
            for (size_t a = 0; a < world; ++a) {
                for (size_t b = a + 1; b < world; ++b) {
                    const Load change = cost(slots_[first + b]) - cost(slots_[first + a]);
                    // Half of what the sum of squares would change by.
                    if ((ranks_[a] - ranks_[b] + change).dot(change) >= 0) continue;
                    std::swap(slots_[first + a], slots_[first + b]);
                    ranks_[a] = ranks_[a] + change;
                    ranks_[b] = ranks_[b] - change;
                    traded = true;
                }
            }
        }
        return traded;
    }

    std::vector<Load> costs_;
    std::vector<int32_t> slots_;
    std::vector<Load> ranks_;
    std::vector<size_t> order_;
};

}  // namespace

std::vector<int32_t> share_packs(const PlannedRows& plan, int64_t packs_per_step, int64_t world) {
    if (world < 1 || packs_per_step < 1 || packs_per_step % world != 0 || packs_per_step >= int64_t{1} << 31) {
        throw std::invalid_argument(std::to_string(packs_per_step) + " packs per step, expected a multiple of the " +
                                    std::to_string(world) + " ranks, at least 1 and below 2^31");
    }
    const std::vector<Load> loads = pack_loads(plan);
    const size_t size = static_cast<size_t>(packs_per_step), ranks = static_cast<size_t>(world);
    const size_t steps = (loads.size() + size - 1) / size, each = size / ranks;
    std::vector<int32_t> places(steps * size);
    Dealer dealer(size, ranks);
    for (size_t step = 0; step < steps; ++step) {
        int32_t* out = places.data() + step * size;
        if (ranks == 1) {
            std::iota(out, out + size, 0);
            continue;
        }
        const size_t first = step * size;
        const std::vector<int32_t>& slots = dealer.deal(loads.data() + first, std::min(size, loads.size() - first));
        for (size_t rank = 0; rank < ranks; ++rank) {
            for (size_t micro = 0; micro < each; ++micro) out[rank * each + micro] = slots[micro * ranks + rank];
        }
    }
    return places;
}

}  // namespace medmax
