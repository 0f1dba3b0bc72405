/* reference.h - the reference kernels: plain C, complete, the oracle of every spec. */
#ifndef QM_REFERENCE_H
#define QM_REFERENCE_H

#include <math.h>

#include "backend.h"
#include "dtype.h"
#include "philox.h"

#define X(name) int32_t qm_reference_##name(void *context, const qm_##name##_args *args);
QM_KERNEL_LIST(X)
#undef X

extern const qm_host *qm_reference_host;
/* The complete table; the CPU's begins as its copy. */
extern const qm_kernels qm_reference_kernels;

/* GELU in the exact or the tanh form, and its derivative. */
double qm_reference_gelu(double x, int tanh_form);
double qm_reference_gelu_grad(double x, int tanh_form);

/* Values that lie in device memory, checked by host backends before they index with them: offsets
** of packed sequences ascend from 0 to rows, targets are classes, positions stand in the table. */
int32_t qm_reference_check_offsets(const char *name, const qm_array *offsets, int64_t rows);
int32_t qm_reference_check_finite(const char *name, const qm_array *x);
int32_t qm_reference_check_groups(const qm_gptq_rows_args *args);
/* What is added to the diagonal; and the refusal of a matrix from the row where it fails. */
double qm_reference_damped(const qm_cholesky_inverse_args *args);
int32_t qm_reference_not_positive(int64_t row);
int32_t qm_reference_check_targets(const qm_cross_entropy_args *args);
double qm_reference_loss_scale(const qm_cross_entropy_args *args);
/* Raise unless all of the i32 numbers are from 0 to count - 1. */
int32_t qm_reference_check_rows(const char *argument, const qm_array *numbers, int64_t count);

/* Host memory for host backends: 64-byte aligned, huge pages where they help. */
int32_t qm_reference_allocate(void *context, int64_t size_bytes, void **memory);
void qm_reference_release(void *context, void *memory, int64_t size_bytes);
int32_t qm_reference_write(void *context, void *out, const void *host, int64_t size_bytes);
int32_t qm_reference_read(void *context, const void *x, void *host, int64_t size_bytes);
int32_t qm_reference_sync(void *context);

#endif
