  ;; Spliced into kernels in place of the line ";; include math.wat" (see wasm.ts).

  ;; Four consecutive elements from $at on as f32: f32 ($size 4) or bf16 ($size 2), which is the upper half of an f32.
  (func $load4 (param $at i32) (param $size i32) (result v128)
    (if (result v128) (i32.eq (local.get $size) (i32.const 4))
      (then (v128.load (local.get $at)))
      (else (i32x4.shl (v128.load16x4_u (local.get $at)) (i32.const 16)))))

  ;; One element, in lane 0; the other lanes are 0.
  (func $load1 (param $at i32) (param $size i32) (result v128)
    (if (result v128) (i32.eq (local.get $size) (i32.const 4))
      (then (v128.load32_zero (local.get $at)))
      (else (i32x4.replace_lane 0 (v128.const i32x4 0 0 0 0) (i32.shl (i32.load16_u (local.get $at)) (i32.const 16))))))

  ;; Rounds to bf16 in the upper half of each lane, to nearest, ties to even; a NaN stays one.
  (func $round (param $x v128) (result v128)
    (v128.bitselect
      (i32x4.add (local.get $x)
        (i32x4.add (v128.const i32x4 0x7fff 0x7fff 0x7fff 0x7fff)
          (v128.and (i32x4.shr_u (local.get $x) (i32.const 16)) (v128.const i32x4 1 1 1 1))))
      (v128.or (local.get $x) (v128.const i32x4 0x400000 0x400000 0x400000 0x400000))
      (f32x4.eq (local.get $x) (local.get $x))))

  (func $store4 (param $at i32) (param $size i32) (param $x v128)
    (if (i32.eq (local.get $size) (i32.const 4))
      (then (v128.store (local.get $at) (local.get $x)))
      (else
        (local.set $x (call $round (local.get $x)))
        (v128.store64_lane 0 (local.get $at)
          (i8x16.shuffle 2 3 6 7 10 11 14 15 2 3 6 7 10 11 14 15 (local.get $x) (local.get $x))))))

  ;; Stores lane 0.
  (func $store1 (param $at i32) (param $size i32) (param $x v128)
    (if (i32.eq (local.get $size) (i32.const 4))
      (then (v128.store32_lane 0 (local.get $at) (local.get $x)))
      (else (v128.store16_lane 1 (local.get $at) (call $round (local.get $x))))))

  ;; e^x to about 1e-7 relative over the whole range: x = n ln 2 + r, a polynomial in r (Cephes' expf), times 2^n in two
  ;; steps, so that results may be subnormal or infinite. NaN stays NaN.
  (func $exp (param $x v128) (result v128)
    (local $n v128) (local $r v128) (local $p v128) (local $c v128) (local $i v128)
    (local.set $x (f32x4.pmin (f32x4.pmax (local.get $x) (v128.const f32x4 -104 -104 -104 -104)) (v128.const f32x4 89 89 89 89)))
    ;; Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    (local.set $c (v128.const f32x4 12582912 12582912 12582912 12582912))
    (local.set $n (v128.const f32x4 1.44269504 1.44269504 1.44269504 1.44269504))
    local.get $x local.get $n local.get $c f32x4.relaxed_madd local.set $p
    (local.set $i (i32x4.sub (local.get $p) (local.get $c)))
    (local.set $n (f32x4.sub (local.get $p) (local.get $c)))
    (local.set $p (v128.const f32x4 -0.693359375 -0.693359375 -0.693359375 -0.693359375))
    local.get $n local.get $p local.get $x f32x4.relaxed_madd local.set $r
    (local.set $p (v128.const f32x4 2.12194440e-4 2.12194440e-4 2.12194440e-4 2.12194440e-4))
    local.get $n local.get $p local.get $r f32x4.relaxed_madd local.set $r
    (local.set $p (v128.const f32x4 1.9875691500e-4 1.9875691500e-4 1.9875691500e-4 1.9875691500e-4))
    (local.set $c (v128.const f32x4 1.3981999507e-3 1.3981999507e-3 1.3981999507e-3 1.3981999507e-3))
    local.get $p local.get $r local.get $c f32x4.relaxed_madd local.set $p
    (local.set $c (v128.const f32x4 8.3334519073e-3 8.3334519073e-3 8.3334519073e-3 8.3334519073e-3))
    local.get $p local.get $r local.get $c f32x4.relaxed_madd local.set $p
    (local.set $c (v128.const f32x4 4.1665795894e-2 4.1665795894e-2 4.1665795894e-2 4.1665795894e-2))
    local.get $p local.get $r local.get $c f32x4.relaxed_madd local.set $p
    (local.set $c (v128.const f32x4 1.6666665459e-1 1.6666665459e-1 1.6666665459e-1 1.6666665459e-1))
    local.get $p local.get $r local.get $c f32x4.relaxed_madd local.set $p
    (local.set $c (v128.const f32x4 5.0000001201e-1 5.0000001201e-1 5.0000001201e-1 5.0000001201e-1))
    local.get $p local.get $r local.get $c f32x4.relaxed_madd local.set $p
    (local.set $c (f32x4.mul (local.get $r) (local.get $r)))
    local.get $p local.get $c local.get $r f32x4.relaxed_madd local.set $p
    (local.set $p (f32x4.add (local.get $p) (v128.const f32x4 1 1 1 1)))
    (local.set $n (i32x4.shr_s (local.get $i) (i32.const 1)))
    (local.set $i (i32x4.sub (local.get $i) (local.get $n)))
    (f32x4.mul
      (f32x4.mul (local.get $p)
        (i32x4.shl (i32x4.add (local.get $n) (v128.const i32x4 127 127 127 127)) (i32.const 23)))
      (i32x4.shl (i32x4.add (local.get $i) (v128.const i32x4 127 127 127 127)) (i32.const 23))))

  ;; Sum of the two lanes.
  (func $sum2 (param $x v128) (result f64)
    (f64.add (f64x2.extract_lane 0 (local.get $x)) (f64x2.extract_lane 1 (local.get $x))))

  ;; $total (f64x2) plus the four f32 of $x.
  (func $accumulate (param $total v128) (param $x v128) (result v128)
    (f64x2.add
      (f64x2.add (local.get $total) (f64x2.promote_low_f32x4 (local.get $x)))
      (f64x2.promote_low_f32x4 (i8x16.shuffle 8 9 10 11 12 13 14 15 8 9 10 11 12 13 14 15 (local.get $x) (local.get $x)))))
