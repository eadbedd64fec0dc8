"""Address spaces of devices: VFIO type1 containers and iommufd's, over I/O page tables."""
