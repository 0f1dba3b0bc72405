/* layer_norm.cu - layer normalisation and its gradient. See norm.cuh. */
#include "norm.cuh"

int32_t qm_cuda_layer_norm(void *context, const qm_layer_norm_args *args) {
  QM_CUDA_ENTER(context);
  qm_cuda_norm norm = {};
  norm.name = "layer_norm";
  norm.x = args->x.data;
  norm.residual = args->residual.data;
  norm.sum = args->sum.data;
  norm.out = args->out.data;
  norm.weight = args->weight.data;
  norm.bias = args->bias.data;
  norm.mean = (float *)args->mean.data;
  norm.rstd = (float *)args->rstd.data;
  norm.rows = args->rows;
  norm.columns = args->columns;
  norm.dtype = args->x.dtype;
  norm.weight_dtype = args->weight.dtype;
  norm.eps = (float)args->eps;
  return qm_cuda_norm_run(cuda, &norm);
}

int32_t qm_cuda_layer_norm_backward(void *context, const qm_layer_norm_backward_args *args) {
  QM_CUDA_ENTER(context);
  qm_cuda_norm_backward norm = {};
  norm.name = "layer_norm_backward";
  norm.dout = args->dout.data;
  norm.x = args->sum.data;
  norm.dsum = args->dsum.data;
  norm.dx = args->dx.data;
  norm.weight = args->weight.data;
  norm.mean = (const float *)args->mean.data;
  norm.rstd = (const float *)args->rstd.data;
  norm.dweight = (float *)args->dweight.data;
  norm.dbias = (float *)args->dbias.data;
  norm.rows = args->rows;
  norm.columns = args->columns;
  norm.dtype = args->sum.dtype;
  norm.weight_dtype = args->weight.dtype;
  return qm_cuda_norm_backward_run(cuda, &norm);
}
