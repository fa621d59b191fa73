// The scans on a CPU, forward, backward and by single steps.
//
// The selective scan is described in torch_scan.py. A group of CHANNELS channels, CHUNK positions and one state at a time: everything that is touched in the inner loops
// lies in the first-level cache, lanes are channels, and a state costs the same whatever N is. The forward pass keeps
// the states at the start of each chunk; the backward pass computes the ones in between again. A single position, when
// text is generated, is a pass over the states as they lie in memory: there lanes are states. The scan with scalar decay
// goes another way: see scalar_decay.h.
//
// All of it is one translation unit, so that the compiler sees through every call.

#include <torch/library.h>

#include "forward.h"
#include "backward.h"
#include "step.h"
#include "scalar_decay_forward.h"
#include "scalar_decay_backward.h"
#include "convolution.h"
#include "mixer_step.h"

TORCH_LIBRARY(hf_compressm_kernel, library) {
  library.def("forward", &scan_forward);
  library.def("backward", &scan_backward);
  library.def("scalar_decay_forward", &scalar_decay_forward);
  library.def("scalar_decay_backward", &scalar_decay_backward);
  library.def("convolution_forward", &convolution_forward);
  library.def("convolution_backward", &convolution_backward);
  library.def(
      "step(Tensor(a!) state, Tensor u, Tensor time_step, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate, "
      "Tensor? bias, bool softplus) -> Tensor");
  library.def(
      "scalar_decay_step(Tensor(a!) state, Tensor x, Tensor time_step, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? bias, bool softplus) -> Tensor");
  library.def(
      "causal_convolution_step(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor");
  library.def(
      "selective_mixer_step(Tensor hidden, Tensor(a!) conv_state, Tensor(b!) state, Tensor? norm, float epsilon, "
      "Tensor in_weight, Tensor? in_bias, Tensor conv_weight, Tensor? conv_bias, Tensor x_weight, Tensor step_weight, Tensor? step_bias, Tensor A_log, "
      "Tensor D, Tensor out_weight, Tensor? out_bias) -> Tensor");
  library.def(
      "scalar_decay_mixer_step(Tensor hidden, Tensor(a!) conv_state, Tensor(b!) state, Tensor? norm, float epsilon, "
      "Tensor in_weight, Tensor? in_bias, Tensor conv_weight, Tensor? conv_bias, Tensor step_bias, Tensor A_log, "
      "Tensor D, int groups, Tensor? B_projection, Tensor? C_projection, Tensor gated_norm, float gated_epsilon, "
      "int gated_channels, Tensor out_weight, Tensor? out_bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(hf_compressm_kernel, CPU, library) {
  library.impl("step", &step);
  library.impl("scalar_decay_step", &scalar_decay_step);
  library.impl("causal_convolution_step", &causal_convolution_step);
  library.impl("selective_mixer_step", &selective_mixer_step);
  library.impl("scalar_decay_mixer_step", &scalar_decay_mixer_step);
}
