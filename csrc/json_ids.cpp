#include "json_ids.hpp"

#include <cstring>

namespace medmax {
namespace {

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r'; }

// A position in one line; every step returns false where the line is not the plain case.
class Cursor {
public:
    Cursor(const char* begin, const char* end) : at_(begin), end_(end) {}

    const char* at() const { return at_; }

    void skip_space() {
        while (at_ < end_ && is_space(*at_)) ++at_;
    }

    bool take(char c) {
        skip_space();
        if (at_ == end_ || *at_ != c) return false;
        ++at_;
        return true;
    }

    bool at_end() {
        skip_space();
        return at_ == end_;
    }

    // A key without escapes; `equal` tells whether it is the wanted one.
    bool key(const std::string& wanted, bool* equal) {
        if (!take('"')) return false;
        const auto* stop = static_cast<const char*>(std::memchr(at_, '"', static_cast<size_t>(end_ - at_)));
        if (!stop) return false;
        const auto length = static_cast<size_t>(stop - at_);
        if (std::memchr(at_, '\\', length)) return false;
        *equal = length == wanted.size() && std::memcmp(at_, wanted.data(), length) == 0;
        at_ = stop + 1;
        return true;
    }

    // The rest of a string whose opening quote has been taken.
    bool skip_string() {
        for (; at_ < end_; ++at_) {
            if (*at_ == '"') {
                ++at_;
                return true;
            }
            if (*at_ == '\\' && ++at_ == end_) return false;
        }
        return false;
    }

    // Any value, by its brackets and quotes; whether it is JSON is for the parser to say.
    bool skip_value() {
        skip_space();
        int64_t depth = 0;
        while (at_ < end_) {
            const char c = *at_;
            if (depth == 0 && (c == ',' || c == '}' || c == ']')) return true;
            ++at_;
            if (c == '"') {
                if (!skip_string()) return false;
            } else if (c == '{' || c == '[') {
                ++depth;
            } else if (c == '}' || c == ']') {
                --depth;
            }
        }
        return false;
    }

    // A list of at least one integer in 0..limit-1, as JSON writes them.
    template <typename Id>
    bool list(uint64_t limit, std::vector<Id>* ids) {
        if (!take('[')) return false;
        do {
            skip_space();
            const char* first = at_;
            uint64_t value = 0;
            // More digits than ten could overflow, and belong to no id.
            while (at_ < end_ && *at_ >= '0' && *at_ <= '9' && at_ - first <= 10) {
                value = 10 * value + static_cast<uint64_t>(*at_++ - '0');
            }
            if (at_ == first || (*first == '0' && at_ - first > 1) || value >= limit) return false;
            ids->push_back(static_cast<Id>(value));
        } while (take(','));
        return take(']');
    }

private:
    const char* at_;
    const char* end_;
};

template <typename Id>
bool scan_line(const char* begin, const char* end, const std::string& key, uint64_t limit, std::vector<Id>* ids,
               const char** from, const char** to) {
    Cursor cursor(begin, end);
    bool found = false;
    if (!cursor.take('{')) return false;
    do {
        bool equal = false;
        if (!cursor.key(key, &equal) || !cursor.take(':')) return false;
        if (!equal) {
            if (!cursor.skip_value()) return false;
            continue;
        }
        if (found) return false;
        found = true;
        cursor.skip_space();
        *from = cursor.at();
        if (!cursor.list(limit, ids)) return false;
        *to = cursor.at();
    } while (cursor.take(','));
    return found && cursor.take('}') && cursor.at_end();
}

}  // namespace

template <typename Id>
JsonIds<Id> scan_json_ids(const char* text, size_t size, const std::string& key, uint64_t limit) {
    JsonIds<Id> found;
    found.offsets.push_back(0);
    const char* end = text + size;
    for (const char* line = text; line < end;) {
        const auto* stop = static_cast<const char*>(std::memchr(line, '\n', static_cast<size_t>(end - line)));
        if (!stop) stop = end;
        const char *from = nullptr, *to = nullptr;
        const size_t before = found.ids.size();
        if (scan_line(line, stop, key, limit, &found.ids, &from, &to)) {
            found.spans.push_back(from - text);
            found.spans.push_back(to - text);
        } else {
            found.ids.resize(before);
            found.spans.insert(found.spans.end(), {-1, -1});
        }
        found.offsets.push_back(static_cast<int64_t>(found.ids.size()));
        line = stop + 1;
    }
    return found;
}

template JsonIds<uint16_t> scan_json_ids(const char*, size_t, const std::string&, uint64_t);
template JsonIds<uint32_t> scan_json_ids(const char*, size_t, const std::string&, uint64_t);

}  // namespace medmax
