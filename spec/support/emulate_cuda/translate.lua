---CUDA C++, preprocessed, to C++ that a host compiler takes: luajit translate.lua <preprocessed.cu >kernel.cpp
---
---A launch becomes a call of emulate::launch, shared memory becomes static (one block runs at a time), or
---the block's own allocation where its size comes with the launch. Inline PTX becomes calls too: `op.a::b
---{%0, %1}, [%2], 16;` is emulate::ptx::op_a__b(first, second, third, 16), its operands in the order of the
---text, so that a wrong number in the text is wrong here as well.

---Position behind the bracket that closes the one at `from`; strings are stepped over.
local function behind(text, from)
  local depth, at = 0, from
  while true do
    at = text:find('[()%[%]{}"]', at)
    local found = text:sub(at, at)
    if found == '"' then
      at = text:find('[^\\]"', at) + 1
    else
      depth = depth + (found:find("[%(%[{]") and 1 or -1)
      if depth == 0 then return at + 1 end
    end
    at = at + 1
  end
end

---Cut at every `separator` (one character) that stands outside brackets and strings.
local function cut(text, separator)
  local parts, first, at = {}, 1, 1
  while true do
    at = text:find("[" .. separator .. '(%[{"]', at)
    if not at then break end
    local found = text:sub(at, at)
    if found == separator then
      parts[#parts + 1] = text:sub(first, at - 1)
      first, at = at + 1, at + 1
    elseif found == '"' then
      at = at + 1
      while text:sub(at, at) ~= '"' do at = at + (text:sub(at, at) == "\\" and 2 or 1) end
      at = at + 1
    else
      at = behind(text, at)
    end
  end
  parts[#parts + 1] = text:sub(first)
  return parts
end

---The kernel's name, with its template arguments, that ends before `stop`: where it begins.
local function kernel_before(text, stop)
  local at = stop - 1
  while text:sub(at, at):find("%s") do at = at - 1 end
  local closing = text:sub(at, at)
  if closing == ">" or closing == ")" then
    local opening, depth = closing == ">" and "<" or "(", 0
    repeat
      local here = text:sub(at, at)
      depth = depth + (here == closing and 1 or here == opening and -1 or 0)
      at = at - 1
    until depth == 0
  end
  while text:sub(at, at):find("[%w_:]") do at = at - 1 end
  return at + 1
end

local function launches(text)
  local result, done = {}, 1
  while true do
    local opening = text:find("<<<", done, true)
    if not opening then break end
    -- Only the text since the last launch is looked at: the whole is long.
    local before = text:sub(done, opening - 1)
    local first = kernel_before(before, #before + 1)
    local closing = text:find(">>>", opening, true)
    local open = text:find("(", closing, true)
    local stop = behind(text, open)
    local arguments = text:sub(open + 1, stop - 2)
    result[#result + 1] = before:sub(1, first - 1)
    result[#result + 1] = ("emulate::launch(emulate::shape(%s), [=](auto... with) { (%s)(with...); }%s)"):format(
      text:sub(opening + 3, closing - 1), before:sub(first), arguments:find("%S") and ", " .. arguments or "")
    done = stop
  end
  return table.concat(result) .. text:sub(done)
end

---One instruction of PTX, its operands as C++ expressions already.
local function instruction(line)
  line = line:match("^%s*(.-)%s*$")
  if line == "" then return "" end
  if line:find("^%.reg %.pred") then return "bool " .. line:match("(%w+)$") .. ";" end
  if line:find("^%.reg %.b32") then return "uint32_t " .. line:match("(%w+)$") .. ";" end
  if line:find("^[%w_]+:$") then return line .. ";" end
  local unless, label = line:match("^@!(%w+) bra (%w+)$")
  if unless then return ("if (!%s) goto %s;"):format(unless, label) end
  local name, operands = line:match("^([%w_.:]+)%s*(.*)$")
  if not name then error("no translation for the PTX " .. line) end
  operands = operands:gsub("^_, ", ""):gsub("^_|", ""):gsub("[%[%]{}]", "")
  return ("emulate::ptx::%s(%s);"):format(name:gsub("[.:]", "_"), operands)
end

local function assembly(statement)
  local parts, code, operands = cut(statement, ":"), {}, {}
  for i = 2, math.min(#parts, 3) do
    for _, operand in ipairs(cut(parts[i], ",")) do
      local expression = operand:match('^%s*"[^"]*"%s*(%b())')
      operands[#operands + 1] = expression
    end
  end
  local text = {}
  for piece in parts[1]:gmatch('"([^"]*)"') do text[#text + 1] = piece end
  text = table.concat(text):gsub("\\n", "\n")
  -- Braces alone on a line open and close a scope; others gather registers. A label ends a line as well.
  for line in text:gsub(";", ";\n"):gmatch("[^\n]+") do
    line = line:gsub(";%s*$", ""):match("^%s*(.-)%s*$")
    code[#code + 1] = line:find("^[{}]$") and line or (instruction(line))
  end
  local body = table.concat(code, " ")
  -- Last, for expressions hold the very characters that are taken out of PTX.
  body = body:gsub("%%(%d+)", function(number) return operands[number + 1] end)
  return "do { " .. body .. " } while (0)"
end

local function assemblies(text)
  local result, done = {}, 1
  while true do
    local first, last = text:find("%f[%w_]asm%s*%(", done)
    local first_volatile, last_volatile = text:find("%f[%w_]asm volatile%s*%(", done)
    if first_volatile and (not first or first_volatile < first) then first, last = first_volatile, last_volatile end
    if not first then break end
    local stop = behind(text, last)
    result[#result + 1] = text:sub(done, first - 1)
    -- The preprocessor marks line numbers within long statements.
    result[#result + 1] = assembly((text:sub(last + 1, stop - 2):gsub("\n# [^\n]*", "")))
    done = stop
  end
  return table.concat(result) .. text:sub(done)
end

local text = io.read("*a")
text = text:gsub("extern __shared__ (.-)([%w_]+)%[%];", function(type, name)
  type = type:gsub("__align__%b()", "")
  return ("%s*%s = (%s*)emulate::dynamic_shared();"):format(type, name, type)
end)
text = text:gsub("%f[%w_]__shared__%f[^%w_]", "static")
io.write((assemblies(launches(text))))
