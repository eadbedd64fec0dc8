"""What pgemu knows, in forms that other tools read: physical addresses for DRAM simulators, v2p maps, cores for gdb."""
