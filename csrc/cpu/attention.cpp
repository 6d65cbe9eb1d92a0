#include "attention.h"

#include <atomic>
#include <cmath>

#include "buffer.h"
#include "convert.h"
#include "dispatch.h"

namespace alphaprune {
namespace {

// How the work on the keys is cut: a task is a chunk of one sequence for some queries of one key head.
class Tasks {
 public:
  struct Task {
    int64_t sequence, key_head, query, chunk, chunks, of;  // query: its first; of: the first task of the same ones
  };

  // Fills `starts` [sequences + 1] with the number of the first task of each.
  Tasks(const Attention& p, int64_t* starts) : p_(p), starts_(starts) {
    const int64_t shared = p.heads / p.key_heads;
    groups_ = ceil_div(shared, kMostQueries);
    queries_ = ceil_div(shared, groups_);
    units_ = p.key_heads * groups_;
    starts[0] = 0;
    for (int64_t s = 0; s < p.sequences; ++s) {
      starts[s + 1] = starts[s] + units_ * chunks(s);
      keys_ += p.positions[s] + 1 - first(s);
    }
  }

  int64_t count() const { return starts_[p_.sequences]; }
  int64_t keys() const { return keys_; }        // of all sequences together
  int64_t queries() const { return queries_; }  // of a task, at most
  bool joined() const { return count() > p_.sequences * units_; }
  int64_t first(int64_t sequence) const {
    const int64_t past = p_.positions[sequence] + 1 - p_.window;
    return p_.window > 0 && past > 0 ? past : 0;
  }

  // Tasks of one sequence lie in the order of memory: by heads where each has its own stretch, else by positions.
  Task at(int64_t i) const {
    int64_t low = 0, high = p_.sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (starts_[middle] <= i ? low : high) = middle;
    }
    const int64_t inside = i - starts_[low], all = chunks(low);
    const bool by_heads = p_.head_stride > p_.position_stride;
    const int64_t unit = by_heads ? inside / all : inside % units_, chunk = by_heads ? inside % all : inside / units_;
    return {low, unit / groups_, unit % groups_ * queries_, chunk, all, starts_[low] + unit};
  }

  // Number of the task of another chunk of the same queries, for what a task leaves.
  int64_t slot(const Task& task, int64_t chunk) const { return task.of + chunk * units_; }

 private:
  int64_t chunks(int64_t sequence) const {
    return p_.positions[sequence] / kChunkKeys - first(sequence) / kChunkKeys + 1;
  }

  const Attention& p_;
  const int64_t* starts_;
  int64_t groups_, queries_, units_, keys_ = 0;  // units: groups of queries of a sequence, of all key heads
};

// sums [queries][dim] over the sums of weights, in the dtype, to the outputs of a task's queries.
void store(const Attention& p, const Tasks::Task& task, int64_t queries, const float* sums, const float* total) {
  const int64_t head = task.key_head * (p.heads / p.key_heads) + task.query;
  const int64_t at = (task.sequence * p.heads + head) * p.dim;
  for (int64_t g = 0; g < queries; ++g)
    for (int64_t d = 0; d < p.dim; ++d) {
      const int64_t i = g * p.dim + d;
      store_float(p.out, at + i, p.dtype, sums[i] / total[g]);
    }
}

// The sums of all chunks of some queries, in order, into the first one's.
void join(const Attention& p, const Tasks& tasks, const Tasks::Task& task, int64_t queries, int64_t size,
          float* parts) {
  float* all = parts + tasks.slot(task, 0) * size;
  float *most = all + queries * p.dim, *total = most + queries;
  for (int64_t c = 1; c < task.chunks; ++c) {
    const float* sums = parts + tasks.slot(task, c) * size;
    const float *mine = sums + queries * p.dim, *weights = mine + queries;
    for (int64_t g = 0; g < queries; ++g) {
      const float now = mine[g] > most[g] ? mine[g] : most[g];
      const float old = now == most[g] ? 1.0f : std::exp(most[g] - now);
      const float fresh = now == mine[g] ? 1.0f : std::exp(mine[g] - now);
      for (int64_t d = g * p.dim; d < (g + 1) * p.dim; ++d) all[d] = all[d] * old + sums[d] * fresh;
      total[g] = total[g] * old + weights[g] * fresh;
      most[g] = now;
    }
  }
  store(p, task, queries, all, total);
}

// Memory of one call: each part on 64 bytes.
template <class T>
T* take(char*& at, int64_t count) {
  auto* found = reinterpret_cast<T*>(at);
  at += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
  return found;
}

}  // namespace

void attend(const Isa& isa, const Attention& p) {
  if (p.sequences == 0) return;
  const StepLoops& loops = *isa.loops;
  const int64_t shared = p.heads / p.key_heads;

  thread_local Buffer index, memory;
  auto* starts = static_cast<int64_t*>(index.at_least(static_cast<size_t>(p.sequences + 1) * sizeof(int64_t)));
  const Tasks tasks(p, starts);
  const int64_t size = ceil_div(tasks.queries() * (p.dim + kPartialExtra), 16) * 16;
  const int64_t rotated = p.sequences * p.heads * p.dim, counters = tasks.joined() ? tasks.count() : 0;
  const int64_t parts_size = counters * size;
  auto* at = static_cast<char*>(memory.at_least(static_cast<size_t>((rotated + parts_size + counters) * 4 + 3 * 64)));
  float* q = take<float>(at, rotated);
  float* parts = take<float>(at, parts_size);
  auto* done = take<std::atomic<int32_t>>(at, counters);
  for (int64_t i = 0; i < counters; ++i) new (done + i) std::atomic<int32_t>(0);

  parallel_for(p.sequences * p.key_heads, threads_for(4 * rotated),
               [&](int64_t i) { loops.rotate(p, i / p.key_heads, i % p.key_heads, q + i * shared * p.dim); });
  parallel_for(tasks.count(), threads_for(2 * tasks.keys() * p.heads * p.dim), [&](int64_t i) {
    const Tasks::Task task = tasks.at(i);
    const int64_t left = shared - task.query, queries = left < tasks.queries() ? left : tasks.queries();
    const int64_t first = tasks.first(task.sequence), last = p.positions[task.sequence] + 1;
    const int64_t begin = (first / kChunkKeys + task.chunk) * kChunkKeys, end = begin + kChunkKeys;
    const float* mine = q + ((task.sequence * p.key_heads + task.key_head) * shared + task.query) * p.dim;
    alignas(64) float own[kMostQueries * (kMostDim + kPartialExtra)];
    float* sums = task.chunks == 1 ? own : parts + tasks.slot(task, task.chunk) * size;
    loops.chunk(p, task.sequence, task.key_head, mine, queries, begin > first ? begin : first, end < last ? end : last,
                sums);
    if (task.chunks == 1) return store(p, task, queries, sums, sums + queries * (p.dim + 1));
    // Whoever is done last has the sums of all others to see.
    if (done[task.of].fetch_add(1, std::memory_order_acq_rel) + 1 < task.chunks) return;
    join(p, tasks, task, queries, size, parts);
  });
}

}  // namespace alphaprune
