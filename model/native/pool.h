// A pool of threads that computes numbered tiles.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace shoal {

// The calling thread computes tiles too.  Threads take tiles one by one.  A thread that another program interrupts
// delays only the tile that it holds: a call returns when all tiles are done, even if a thread has not started yet.
// If there is not enough memory for a tile, the others are still computed, and the call ends with std::bad_alloc.
// Idle threads spin for a moment, because the next call mostly comes within microseconds, and then sleep.
class Pool {
public:
    // pin: whether to keep each thread but the caller's on a core of its own.
    Pool(int num_threads, bool pin);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int num_threads() const { return static_cast<int>(threads_.size()) + 1; }

    // Calls body(tile, thread) for each tile from 0 to num_tiles, in any order; thread < num_threads().
    template <class Body>
    void run(int num_tiles, const Body& body) {
        if (num_tiles <= 1 || threads_.empty()) {
            for (int tile = 0; tile < num_tiles; ++tile) body(tile, 0);
            return;
        }
        call_ = [](const void* context, int tile, int thread) { (*static_cast<const Body*>(context))(tile, thread); };
        context_ = &body;
        run_all(num_tiles);
    }

    // Calls body(row) for each row.  A few rows stay on one thread, because handing them over takes longer.
    template <class Body>
    void for_rows(int num_rows, const Body& body) {
        constexpr int kAtLeast = 4;
        const int step = std::max(kAtLeast, num_rows / (4 * num_threads()));
        run((num_rows + step - 1) / step, [&](int tile, int) {
            for (int row = tile * step; row < std::min(num_rows, (tile + 1) * step); ++row) body(row);
        });
    }

private:
    // The work that is left, in one word that threads change atomically: the number of the call, its number of tiles,
    // and the next tile.
    struct Ticket {
        static constexpr int kBits = 20;
        static constexpr uint64_t kMask = (1 << kBits) - 1;
        uint64_t word;
        int num_tiles() const { return static_cast<int>(word >> kBits & kMask); }
        int next() const { return static_cast<int>(word & kMask); }
        bool has_work() const { return next() < num_tiles(); }
    };

    // Threads that wait for a condition: they spin for a moment and then sleep.
    class Waiting {
    public:
        template <class Condition>
        void wait(const Condition& condition);
        // Must be called after the condition has become true.
        void wake();

    private:
        std::atomic<int> num_sleeping_{0};
        std::mutex mutex_;
        std::condition_variable wake_;
    };

    void run_all(int num_tiles);
    void take_tiles(int thread);
    void live(int thread);

    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int> num_done_{0};
    alignas(64) void (*call_)(const void*, int, int) = nullptr;
    const void* context_ = nullptr;
    uint64_t num_calls_ = 0;
    std::atomic<bool> lacks_memory_{false};  // for a tile of this call

    std::atomic<bool> ends_{false};
    Waiting idle_;    // threads without a tile
    Waiting caller_;  // for the last tile
    std::vector<std::thread> threads_;
};

}  // namespace shoal
