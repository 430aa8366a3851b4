// Which positions queries see.
#pragma once

#include <algorithm>

namespace shoal {

// What the queries of some layers see, and in whose blocks.
struct View {
    int group;   // of block tables
    int window;  // 0 for all positions
    int chunk;   // likewise

    bool operator==(const View& other) const {
        return group == other.group && window == other.window && chunk == other.chunk;
    }

    // The first position that the query at a position sees.
    int first_seen(int position) const {
        int first = 0;
        if (window > 0) first = std::max(first, position - window + 1);
        if (chunk > 0) first = std::max(first, position / chunk * chunk);
        return first;
    }
};

}  // namespace shoal
