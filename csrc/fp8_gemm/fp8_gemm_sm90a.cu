// fp8_gemm on wgmma.
