// The lists of ids in lines of JSON, read without making a Python integer of each.
//
// A line is taken only if it is the plain case: an object that has the wanted key once at its top level, without
// escapes in the keys there, holding a flat list of integers from 0 up to a limit. Everything else is left to a real
// JSON parser, and so is the rest of a taken line: the caller puts `[]` where the list stood and has that parsed, which
// also proves that the line was JSON. So this scanner may refuse, but cannot be wrong about what it takes.
// Cost: one pass over the bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace medmax {

template <typename Id>
struct JsonIds {
    std::vector<Id> ids;
    // Of line i: ids[offsets[i]] .. ids[offsets[i + 1] - 1], read from text[spans[2 * i]] .. text[spans[2 * i + 1] - 1].
    // Of a line that was refused: no ids, and -1.
    std::vector<int64_t> offsets;
    std::vector<int64_t> spans;
};

// Scan all lines of `text`; ids must be below `limit`, which must fit in Id.
template <typename Id>
JsonIds<Id> scan_json_ids(const char* text, size_t size, const std::string& key, uint64_t limit);

}  // namespace medmax
