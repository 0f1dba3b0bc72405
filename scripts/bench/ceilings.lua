-- ceilings.lua - what a device can do at most: bytes/s of a copy, FLOP/s of a bf16 matrix product.
--
--   bin/quartermoon scripts/bench/ceilings.lua [device]
--
-- Other benchmarks print their figures as shares of these, measured in the same run.

local qm = require("quartermoon")

local device = assert(qm.device(arg[1] or tostring(qm.default_device())))
print(device:info().description)
local found = qm.ceilings.of(device)
print(("copy %12.3f TB/s, read and written\ngemm %12.2f TFLOP/s, bf16"):format(found.copy * 1e-12, found.gemm * 1e-12))
