"""What people hold in their hands: machines, inodes, processes, VMs."""
