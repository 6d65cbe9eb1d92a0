#include "norm.h"

#include "attention.h"

namespace alphaprune {

void rms_norm(const Norm& p, const std::string& loop) {
  static const AttentionLoop& best = attention_loop();
  (loop.empty() ? best : attention_loop(loop)).norm(p);
}

}  // namespace alphaprune
