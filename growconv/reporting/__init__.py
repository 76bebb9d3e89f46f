"""What runs left behind: their records, tables and figures over many of them, and the report of one."""
