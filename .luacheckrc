std = "luajit"
max_line_length = 120
files["spec"] = { std = "luajit+busted" }
files["premake5.lua"] = { std = "luajit", globals = { "workspace" }, ignore = { "113" } }
exclude_files = { "build" }
