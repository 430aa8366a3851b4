#include "pool.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <new>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace shoal {

namespace {

using Clock = std::chrono::steady_clock;

// How long a waiting thread only spins, and after how long it sleeps; in between it yields.
constexpr auto kSpin = std::chrono::microseconds(20);
constexpr auto kStayAwake = std::chrono::milliseconds(2);
// If a yield takes longer than this, another program has run meanwhile.
constexpr auto kYielded = std::chrono::microseconds(50);

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins and yields until `condition` is true.  False if the thread should sleep instead, because that takes long or
// another program wants the core.  A thread that wakes from sleep gets a core at once; one that yields has to queue.
template <class Condition>
bool stay_awake_for(const Condition& condition) {
    for (int i = 0; i < 64; ++i) {
        if (condition()) return true;
        relax();
    }
    const Clock::time_point begin = Clock::now();
    for (Clock::time_point now = begin; now < begin + kStayAwake;) {
        for (int i = 0; i < 16; ++i) {
            if (condition()) return true;
            relax();
        }
        const Clock::time_point before = now;
        if (before > begin + kSpin) std::this_thread::yield();
        now = Clock::now();
        if (now > before + kYielded) break;
    }
    return condition();
}

void pin_to_core(std::thread& thread, int index) {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    for (int core = 0; core < CPU_SETSIZE; ++core) {
        if (!CPU_ISSET(core, &allowed) || index-- != 0) continue;
        cpu_set_t own;
        CPU_ZERO(&own);
        CPU_SET(core, &own);
        pthread_setaffinity_np(thread.native_handle(), sizeof own, &own);
        return;
    }
#else
    (void)thread, (void)index;
#endif
}

}  // namespace

Pool::Pool(int num_threads, bool pin) {
    for (int thread = 1; thread < num_threads; ++thread) {
        threads_.emplace_back([this, thread] { live(thread); });
        if (pin) pin_to_core(threads_.back(), thread);
    }
}

Pool::~Pool() {
    ends_ = true;
    idle_.wake();
    for (std::thread& thread : threads_) thread.join();
}

void Pool::run_all(int num_tiles) {
    num_done_.store(0, std::memory_order_relaxed);
    ticket_.store(++num_calls_ << 2 * Ticket::kBits | static_cast<uint64_t>(num_tiles) << Ticket::kBits);
    idle_.wake();
    take_tiles(0);
    caller_.wait([&] { return num_done_.load() == num_tiles; });
    if (lacks_memory_.exchange(false)) throw std::bad_alloc();
}

// A call does not return before every tile that was taken is done, so the call's body stays valid that long.
void Pool::take_tiles(int thread) {
    while (Ticket{ticket_.load(std::memory_order_relaxed)}.has_work()) {
        const Ticket taken{ticket_.fetch_add(1, std::memory_order_acquire)};
        if (!taken.has_work()) return;
        try {
            call_(context_, taken.next(), thread);
        } catch (const std::bad_alloc&) {
            lacks_memory_ = true;
        }
        if (num_done_.fetch_add(1) + 1 == taken.num_tiles()) caller_.wake();
    }
}

void Pool::live(int thread) {
    std::current_exception();  // makes the room that a thread has for exceptions: when one comes there may be no memory
    while (!ends_) {
        take_tiles(thread);
        idle_.wait([&] { return ends_ || Ticket{ticket_.load()}.has_work(); });
    }
}

template <class Condition>
void Pool::Waiting::wait(const Condition& condition) {
    if (stay_awake_for(condition)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    num_sleeping_.fetch_add(1);
    wake_.wait(lock, condition);
    num_sleeping_.fetch_sub(1);
}

// A thread that is about to sleep first counts itself and then reads the condition a last time.  The thread that makes
// the condition true does that first and then reads the count.  So at least one of the two sees the other.
void Pool::Waiting::wake() {
    if (num_sleeping_.load() == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex_); }
    wake_.notify_all();
}

}  // namespace shoal
