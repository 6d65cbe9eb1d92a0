// Attention of a decode step with vectors that every CPU of the compiler's baseline has: SSE2, or those of aarch64.
#include "attention_loop.h"

namespace alphaprune {

const StepLoops kStepScalar = {AnyLoop<Lanes<4, 8>>::rotate, AnyLoop<Lanes<4, 8>>::chunk, AnyLoop<Lanes<4, 8>>::norm,
                               AnyLoop<Lanes<4, 8>>::swiglu};

}  // namespace alphaprune
