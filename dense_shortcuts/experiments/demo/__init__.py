"""The page that `dsnet demo` serves on this machine."""
