#include "planner.hpp"

#include <stdexcept>
#include <string>
#include <utility>

namespace medmax {
namespace {

constexpr uint32_t kNone = 0xffffffffu;
// How far ahead of a loop with scattered accesses memory is asked for. Beyond a few million rows the arrays leave the
// caches, and waiting for each access in turn would triple the time.
constexpr size_t kAhead = 16;

// splitmix64, written out because a plan must not change with the compiler or the standard library. Its state after
// n draws is seed + n * step, which the Python reference uses to draw all at once.
class Random {
public:
    Random(uint64_t seed, uint64_t epoch) : state_(mix(seed + kStep) ^ mix(epoch + 2 * kStep)) {}

    // Fisher-Yates from the end.
    void shuffle(std::vector<uint32_t>& values) {
        for (size_t i = values.size(); i > 1; --i) {
            if (i > kAhead + 1) __builtin_prefetch(&values[draw(kAhead + 1, i - kAhead)], 1);
            std::swap(values[i - 1], values[draw(1, i)]);
            state_ += kStep;
        }
    }

private:
    // The draw after `steps` of the state, uniform in 0..bound-1; the bias of the multiplication is below bound / 2^32.
    size_t draw(uint64_t steps, size_t bound) const { return ((mix(state_ + steps * kStep) >> 32) * bound) >> 32; }

    static constexpr uint64_t kStep = 0x9e3779b97f4a7c15ull;

    static uint64_t mix(uint64_t x) {
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
        return x ^ (x >> 31);
    }

    uint64_t state_;
};

// A set of integers 0..size-1 with "smallest member >= x": level 0 has one bit per integer, and a bit of each higher
// level says whether a word of the level below is not zero.
class OrderedBits {
public:
    explicit OrderedBits(size_t size) {
        do {
            size = (size + 63) / 64;
            levels_.emplace_back(size, 0);
        } while (size > 1);
    }

    void insert(size_t x) {
        for (auto& level : levels_) {
            level[x >> 6] |= uint64_t{1} << (x & 63);
            x >>= 6;
        }
    }

    void erase(size_t x) {
        for (auto& level : levels_) {
            level[x >> 6] &= ~(uint64_t{1} << (x & 63));
            if (level[x >> 6] != 0) return;
            x >>= 6;
        }
    }

    // Smallest member >= x, or kNone: up until a word has a later bit, then down along first bits.
    uint32_t find(size_t x) const {
        for (size_t depth = 0; depth < levels_.size(); ++depth) {
            const size_t word = x >> 6;
            if (word >= levels_[depth].size()) return kNone;
            const uint64_t later = levels_[depth][word] >> (x & 63) << (x & 63);
            if (later != 0) return first_below(depth, word * 64 + lowest(later));
            x = word + 1;
        }
        return kNone;
    }

private:
    static size_t lowest(uint64_t bits) { return static_cast<size_t>(__builtin_ctzll(bits)); }

    uint32_t first_below(size_t depth, size_t x) const {
        while (depth-- > 0) x = x * 64 + lowest(levels_[depth][x]);
        return static_cast<uint32_t>(x);
    }

    std::vector<std::vector<uint64_t>> levels_;
};

// Numbers of the rows that fit, shuffled, then ordered from the longest to the shortest (stable counting sort).
std::vector<uint32_t> longest_first(const int64_t* lengths, size_t count, size_t capacity, Random& random) {
    std::vector<uint32_t> rows;
    rows.reserve(count);
    std::vector<uint32_t> start(capacity + 2, 0);
    for (size_t row = 0; row < count; ++row) {
        if (lengths[row] < 0) throw std::invalid_argument("row " + std::to_string(row) + " has a negative length");
        if (lengths[row] == 0 || lengths[row] > static_cast<int64_t>(capacity)) continue;
        rows.push_back(static_cast<uint32_t>(row));
        ++start[capacity - static_cast<size_t>(lengths[row]) + 1];
    }
    random.shuffle(rows);
    for (size_t i = 1; i < start.size(); ++i) start[i] += start[i - 1];
    std::vector<uint32_t> sorted(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
        if (i + kAhead < rows.size()) __builtin_prefetch(&lengths[rows[i + kAhead]]);
        sorted[start[capacity - static_cast<size_t>(lengths[rows[i]])]++] = rows[i];
    }
    return sorted;
}

// Pack of every row of `rows` (in that order); returns the number of packs. Packs of equal room form a stack: the one
// that came to this room last is filled first.
uint32_t best_fit(const std::vector<uint32_t>& rows, const int64_t* lengths, size_t capacity,
                  std::vector<uint32_t>& pack_of) {
    OrderedBits rooms(capacity + 1);
    std::vector<uint32_t> top(capacity + 1, kNone);
    std::vector<uint32_t> below;
    pack_of.resize(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
        if (i + kAhead < rows.size()) __builtin_prefetch(&lengths[rows[i + kAhead]]);
        const size_t length = static_cast<size_t>(lengths[rows[i]]);
        size_t room = rooms.find(length);
        uint32_t pack;
        if (room == kNone) {
            room = capacity;
            pack = static_cast<uint32_t>(below.size());
            below.push_back(kNone);
        } else {
            pack = top[room];
            top[room] = below[pack];
            if (top[room] == kNone) rooms.erase(room);
        }
        pack_of[i] = pack;
        room -= length;
        // A full pack can take nothing more: it is never looked up again.
        if (room == 0) continue;
        if (top[room] == kNone) rooms.insert(room);
        below[pack] = top[room];
        top[room] = pack;
    }
    return static_cast<uint32_t>(below.size());
}

}  // namespace

Plan plan_packs(const int64_t* lengths, size_t count, int64_t capacity, uint64_t seed, uint64_t epoch) {
    if (capacity < 1 || capacity > kMaxCapacity) {
        throw std::invalid_argument("pack capacity " + std::to_string(capacity) + ", expected 1.." +
                                    std::to_string(kMaxCapacity));
    }
    if (count >= kNone) throw std::invalid_argument("too many rows for one plan, expected fewer than 2^32 - 1");
    Random random(seed, epoch);
    const std::vector<uint32_t> rows = longest_first(lengths, count, static_cast<size_t>(capacity), random);
    std::vector<uint32_t> pack_of;
    const uint32_t packs = best_fit(rows, lengths, static_cast<size_t>(capacity), pack_of);

    std::vector<uint32_t> order(packs);
    for (uint32_t pack = 0; pack < packs; ++pack) order[pack] = pack;
    random.shuffle(order);
    std::vector<uint32_t> position(packs);
    for (uint32_t i = 0; i < packs; ++i) position[order[i]] = i;

    Plan plan;
    plan.offsets.assign(size_t{packs} + 1, 0);
    for (uint32_t pack : pack_of) ++plan.offsets[position[pack] + 1];
    for (size_t i = 1; i < plan.offsets.size(); ++i) plan.offsets[i] += plan.offsets[i - 1];
    std::vector<int64_t> next(plan.offsets.begin(), plan.offsets.end() - 1);
    plan.rows.resize(rows.size());
    for (uint32_t& pack : pack_of) pack = position[pack];
    for (size_t i = 0; i < rows.size(); ++i) {
        if (i + 2 * kAhead < rows.size()) __builtin_prefetch(&next[pack_of[i + 2 * kAhead]], 1);
        if (i + kAhead < rows.size()) __builtin_prefetch(&plan.rows[static_cast<size_t>(next[pack_of[i + kAhead]])], 1);
        plan.rows[static_cast<size_t>(next[pack_of[i]]++)] = rows[i];
    }
    return plan;
}

}  // namespace medmax
