local ffi = require("ffi")
local qm = require("quartermoon")
local mpq = require("spec.support.mpq")
local testing = require("spec.support.testing")

describe("a parameter without columns", function()
  it("may not have more rows than an index can count", function()
    local function empty(rows, dtype) return qm.empty({ rows, 0 }, { dtype = dtype }) end
    assert.error_matches(function()
      qm.QParam.new { data = empty(2 ^ 44, "i32"), scales = empty(2 ^ 17, "f32"), zeros = empty(2 ^ 17, "f32"),
        w_bit = 4, group_size = 2 ^ 30 }
    end, "qm.QParam.new: argument 'data': expected K below 2^31, got K=140737488355328", 1, true)
  end)
end)

describe("qm.QParam", function()
  it("reads code p of a column from bits w_bit * (p mod V) of word p div V", function()
    local q = qm.QParam.new {
      data = qm.tensor({ { 0x76543210 }, { 0x3ABCDEF8 }, { 0 }, { -1 } }, { dtype = "i32" }),
      scales = qm.ones({ 1, 1 }), zeros = qm.zeros({ 1, 1 }), w_bit = 4, group_size = -1,
    }
    local expected = { 0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 14, 13, 12, 11, 10, 3 }
    local codes = q:unpack():totable()
    for p, code in ipairs(expected) do assert.equal(code, codes[p][1]) end
    assert.equal(0, codes[17][1])
    assert.equal(15, codes[32][1])
    assert.same({ 32, 1 }, q.shape)
    assert.equal(32, q.group_size)
    assert.equal("qm.QParam 32 x 1, 4 bit sym, group 32", tostring(q))
  end)

  it("stores asymmetric zero points minus one, along columns", function()
    -- Fields 0 .. 15 of two words: zero points 1 .. 16, of which 16 stays 16.
    local zeros, data = {}, {}
    for n = 0, 31 do zeros[n] = n % 16 end
    local words = {}
    for word = 0, 3 do
      local value = 0
      for i = 7, 0, -1 do value = value * 16 + zeros[word * 8 + i] end
      words[word + 1] = value >= 2 ^ 31 and value - 2 ^ 32 or value
    end
    for r = 1, 4 do
      data[r] = {}
      for n = 1, 32 do data[r][n] = 0 end
    end
    local q = qm.QParam.new { data = qm.tensor(data, { dtype = "i32" }), asym = true, w_bit = 4, group_size = 32,
      scales = qm.full({ 1, 32 }, 0.5), zeros = qm.tensor({ words }, { dtype = "i32" }) }
    local w = q:dequantize("f32"):totable()
    for n = 1, 32 do assert.equal(-0.5 * (zeros[n - 1] + 1), w[7][n]) end
  end)

  for _, asym in ipairs({ true, false }) do
    for _, w_bit in ipairs({ 1, 2, 4, 8 }) do
      local kind = ("%s, %d bit"):format(asym and "asym" or "sym", w_bit)

      it("dequantizes by the formula: " .. kind, function()
        local k, n, size = 96, 32, 64 -- the last group is short
        local q = mpq.random(k, n, { w_bit = w_bit, asym = asym, group_size = size, dtype = "f32",
          q_perm = mpq.permutation(k) })
        local codes, scales, perm = q:unpack():totable(), q.scales:totable(), q.q_perm:totable()
        local zeros = q.zeros:totable()
        local w = q:dequantize("f32"):totable()
        for p = 1, k do
          local g = math.floor((p - 1) / size) + 1
          for column = 1, n do
            local expected
            if asym then
              local per_word = 32 / w_bit
              local word = zeros[g][math.floor((column - 1) / per_word) + 1] % 2 ^ 32
              local zero = math.floor(word / 2 ^ (w_bit * ((column - 1) % per_word))) % 2 ^ w_bit + 1
              expected = scales[g][column] * (codes[p][column] - zero)
            else
              expected = codes[p][column] * scales[g][column] - zeros[g][column]
            end
            assert.equal(tonumber(ffi.new("float", expected)), w[perm[p] + 1][column])
          end
        end
      end)

      it("packs what it dequantized to the same codes: " .. kind, function()
        local q = mpq.random(96, 64, { w_bit = w_bit, asym = asym, g_idx = mpq.random_groups(96, 3), group_size = 32,
          residual_bits = 8, dtype = "f32" })
        local codes, residual = q:unpack():bytes(), q.residual:bytes()
        local w = q:dequantize("f32", "residual")
        q:pack(w)
        assert.equal(codes, q:unpack():bytes())
        assert.equal(residual, q.residual:bytes())
      end)

      for _, dtype in ipairs({ "f32", "f16", "bf16" }) do
        it(("gives the reference's bits: %s, scales %s"):format(kind, dtype), function()
          for _, shape in ipairs({ { 32, 32 }, { 160, 96 }, { 96, asym and 288 or 131 } }) do
            local k, n = shape[1], shape[2]
            for variant = 1, 4 do
              local q = mpq.random(k, n, { w_bit = w_bit, asym = asym, dtype = dtype,
                group_size = variant == 1 and 32 or 64,
                q_perm = variant == 2 and mpq.permutation(k) or nil, residual_bits = ({ 0, 4, 8, 0 })[variant],
                g_idx = variant >= 3 and mpq.random_groups(k, math.ceil(k / 64)) or nil,
                method = variant == 4 and "mse" or "minmax" })
              local r = q:to(testing.device)
              local w = qm.randn({ k, n }, { device = "reference" }, 0, 1.2)
              local w_type = w:to(({ "f32", "bf16", "f16", "f32" })[variant])
              local w_there = w_type:to(testing.device)
              testing.assert_equal(q:unpack(), r:unpack(), "unpack")
              for _, out in ipairs({ "f32", "f16", "bf16" }) do
                for _, form in ipairs({ "codes", "residual", "bie" }) do
                  testing.assert_equal(q:dequantize(out, form), r:dequantize(out, form), out .. " " .. form)
                end
              end
              for _, rounding in ipairs({ "nearest", "stochastic" }) do
                local options = { rounding = rounding }
                if rounding == "stochastic" then options.noise = { seed = 3, step = 7 } end
                q:pack(w_type, options)
                r:pack(w_there, options)
                testing.assert_equal(q.data, r.data, rounding)
                if q.residual then testing.assert_equal(q.residual, r.residual, rounding .. " residual") end
              end
              q:fit(w_type, variant == 4 and "mse" or "minmax", 0.9)
              r:fit(w_there, variant == 4 and "mse" or "minmax", 0.9)
              testing.assert_equal(q.scales, r.scales, "scales")
              testing.assert_equal(q.zeros, r.zeros, "zeros")
              for _, owned in ipairs({ q, r, w, w_type, w_there }) do owned:free() end
            end
          end
        end)
      end
    end
  end

  it("draws a residual evenly from what rounds to its codes, and leaves the codes alone", function()
    for _, bits in ipairs({ 4, 8 }) do
      local q = qm.QParam.quantize(qm.randn({ 64, 96 }), { w_bit = 4, group_size = 32 })
      local plain = q:dequantize("f32"):clone()
      q:add_residual(bits, qm.generator(3))
      testing.assert_equal(plain, q:dequantize("f32"))
      local levels = 2 ^ bits
      local scale = q.scales:to("f32"):totable()
      local with, without = q:dequantize("f32", "residual"):totable(), plain:totable()
      local sum, squares, count = 0, 0, 64 * 96
      for k = 1, 64 do
        for n = 1, 96 do
          local r = (with[k][n] - without[k][n]) / scale[math.ceil(k / 32)][n]
          assert.is_true(r > -0.5001 and r < 0.5)
          sum, squares = sum + r, squares + r * r
        end
      end
      -- Uniform over the levels: mean -1/2 of a level, variance (1 - 1/levels^2) / 12; 5 standard errors.
      assert.near(-0.5 / levels, sum / count, 5 * math.sqrt(1 / 12 / count))
      assert.near((1 - levels ^ -2) / 12 + 0.25 / levels ^ 2, squares / count, 5 * math.sqrt(1 / 180 / count))
    end
  end)
end)
