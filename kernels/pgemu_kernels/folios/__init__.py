"""HugeTLB folios, the vmemmap, pools and the page allocator."""
