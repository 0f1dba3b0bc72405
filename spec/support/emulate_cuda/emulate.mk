# emulate.mk - builds $(OUT)/libquartermoon_cuda.so: the CUDA backend for a machine without a GPU.
HERE := spec/support/emulate_cuda
KERNELS := $(patsubst kernels/cuda/%.cu,%,$(wildcard kernels/cuda/*.cu))
PARTS := emulate ptx hopper libraries products runtime
CXX := g++
FLAGS := -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing $(EXTRA) -I$(HERE)/include -Iengine -Ikernels -include cuda_runtime.h
# The pass over the source that makes code for a Hopper GPU.
DEVICE := -w -D__CUDACC__ -D__CUDA_ARCH__=900 -D__CUDA_ARCH_FEAT_SM90_ALL
OBJECTS := $(KERNELS:%=$(OUT)/%.o) $(PARTS:%=$(OUT)/part_%.o)

$(OUT)/libquartermoon_cuda.so: $(OBJECTS)
	$(CXX) -shared $(EXTRA) -o $@ $(OBJECTS) -fopenmp -llapacke -lm -Wl,-z,nodelete

$(OUT)/%.cpp: kernels/cuda/%.cu $(HERE)/translate.lua
	$(CXX) $(FLAGS) $(DEVICE) -MMD -MP -MF $(OUT)/$*.d -MT $@ -E -x c++ $< | luajit $(HERE)/translate.lua >$@.part
	mv $@.part $@
$(OUT)/%.o: $(OUT)/%.cpp
	$(CXX) $(FLAGS) $(DEVICE) -fpreprocessed -c $< -o $@
$(OUT)/part_%.o: $(HERE)/%.cpp
	$(CXX) $(FLAGS) -O3 -Wall -Wextra -MMD -MP -c $< -o $@

.SECONDARY:
-include $(wildcard $(OUT)/*.d)
