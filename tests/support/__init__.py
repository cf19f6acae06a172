"""What tests share: places, programs, servers, dirty files, plain references, kernels without a GPU."""
