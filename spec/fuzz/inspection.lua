-- What `quartermoon inspect` looks at: a file (the input's first line is its name) or a folder. It takes
-- anything; what is wrong stands in the report.
local qm = require("quartermoon")

return function(bytes, fuzz)
  local name, rest = bytes:match("^file ([%w._-]+)\n(.*)$")
  local path = fuzz.folder
  if name then path = fuzz.write(name, rest) else fuzz.write_parts(bytes, "config.json") end
  local report = qm.inspection.open(path, { values = true })
  for _, problem in ipairs(report.problems) do fuzz.judge(problem) end
  qm.inspection.text(report)
  qm.inspection.text(report, true)
end
