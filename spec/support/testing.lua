-- What specs share: random tensors, comparison with the reference backend, numerical gradients.
local qm = require("quartermoon")

local M = {}

---The device under test: $QM_DEVICE, default cpu.
M.device = os.getenv("QM_DEVICE") or "cpu"

---Values of two tensors differ by at most `tolerance`, relative to the largest expected magnitude, which
---counts as at_least where it is less: for values that may all be near a root.
function M.assert_close(expected, actual, tolerance, what, at_least)
  assert(#expected.shape == #actual.shape, "different number of dimensions")
  for i = 1, #expected.shape do assert(expected.shape[i] == actual.shape[i], "different shapes") end
  local a, count = expected:host()
  local b = actual:host()
  local largest, worst, at = at_least or 1e-30, 0, 0
  for i = 0, count - 1 do
    largest = math.max(largest, math.abs(tonumber(a[i])))
    local difference = math.abs(tonumber(a[i]) - tonumber(b[i]))
    if difference > worst or difference ~= difference then worst, at = difference, i end
  end
  if worst > tolerance * largest or worst ~= worst then
    error(("%s: element %d: expected %.7g, got %.7g; off by %.3g of the largest, allowed %.3g"):format(
      what or "values differ", at, tonumber(a[at]), tonumber(b[at]), worst / largest, tolerance), 2)
  end
end

---Every element equal, to the bit.
function M.assert_equal(expected, actual, what)
  if expected:bytes() ~= actual:bytes() then
    M.assert_close(expected, actual, 0, what)
    error((what or "tensors") .. ": the bits differ", 2)
  end
end

---A copy on the device under test that begins one element behind an aligned address.
function M.shifted(x)
  local count = x:count()
  local room = qm.empty({ count + 1 }, { dtype = x.dtype, device = M.device })
  return room:view_rows("shifted", 2, count):view_as("shifted", x.shape):copy(x)
end

---To the device, and only vectors, such as weights, like M.shifted.
function M.vectors_shifted(x) return #x.shape == 1 and M.shifted(x) or x:to(M.device) end

---A call that is given a number from a tensor which it cannot take. Host devices look first and say
---`sentence`; others leave that number out, and the next call that waits says `late`.
function M.assert_refused_late(call, sentence, late)
  local ok, message = pcall(call)
  if M.device ~= "cpu" and M.device ~= "reference" then
    assert(ok, message)
    ok, message = pcall(function() qm.device(M.device):sync() end)
    sentence = late
  end
  assert(not ok, "the call went through")
  assert(tostring(message):find(sentence, 1, true), ("expected '%s' in '%s'"):format(sentence, tostring(message)))
end

---The same call on the reference backend and on the device under test.
---@param inputs qm.Tensor[]  on the reference device
---@param call function  (tensors...) -> tensors
---@param move function|nil  how an input gets to the device, default `:to`; see M.shifted
---@return table expected, table actual  lists of tensors
function M.both(inputs, call, move)
  local moved = {}
  for i, input in ipairs(inputs) do moved[i] = move and move(input) or input:to(M.device) end
  return { call(unpack(inputs)) }, { call(unpack(moved)) }
end

---Check the gradients of `fn` (tensors -> one tensor, any shape) by central differences, on the
---reference device in f32: d sum(out * weights) / d input against backward().
---@param fn function
---@param inputs qm.Tensor[]  f32 on the reference device; those with requires_grad are checked
---@param options table|nil  { step = 1e-2, tolerance = 2e-3 }
function M.check_gradients(fn, inputs, options)
  options = options or {}
  local step, tolerance = options.step or 1e-2, options.tolerance or 2e-3
  local out = fn(unpack(inputs))
  local weights = qm.randn(out.shape, { device = "reference" })
  local function value()
    return qm.no_grad(function()
      local y, w = fn(unpack(inputs)), weights
      local a, count = y:host()
      local b = w:host()
      local sum = 0
      for i = 0, count - 1 do sum = sum + tonumber(a[i]) * tonumber(b[i]) end
      y:free()
      return sum
    end)
  end
  local seed_grad = out.dtype == "f32" and weights or weights:to(out.dtype)
  out:backward(seed_grad)
  for index, input in ipairs(inputs) do
    if input.requires_grad then
      -- No gradient at all is right where the differences are zero.
      local grad = input.grad or input:zeros_like()
      local analytic = grad:host()
      local buffer, count = input:host()
      local numeric, largest = {}, 1e-6
      for i = 0, count - 1 do
        local saved = tonumber(buffer[i])
        local flat = input:view_as("check_gradients", { count }):view_rows("check_gradients", i + 1, 1)
        flat:fill(saved + step)
        local up = value()
        flat:fill(saved - step)
        local down = value()
        flat:fill(saved)
        flat:free()
        numeric[i] = (up - down) / (2 * step)
        largest = math.max(largest, math.abs(numeric[i]))
      end
      for i = 0, count - 1 do
        local difference = math.abs(numeric[i] - tonumber(analytic[i]))
        assert(difference <= tolerance * largest, ("input %d, element %d: numeric %.6g, backward %.6g"):format(
          index, i, numeric[i], tonumber(analytic[i])))
      end
      input:zero_grad()
    end
  end
end

return M
