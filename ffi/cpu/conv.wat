;; Convolution as a matrix product: `patches` packs what the kernel sees of a picture into panels for matmul.wat.
(module
  (import "env" "memory" (memory 1 65536 shared))
  (import "env" "scratch" (global $scratch i32))

  ;; Panel $job: $width output pixels from $first + $job * $width on, as [k][width] (zeros past pixel $pixels).
  ;; $table has one entry per k: i32 dy, dx and the byte offset of that element from the pixel's corner.
  (func (export "patches") (param $job i32) (param $to i32) (param $x i32) (param $table i32) (param $k i32)
    (param $first i32) (param $pixels i32) (param $outWidth i32) (param $height i32) (param $width_ i32)
    (param $rowBytes i32) (param $pixelBytes i32) (param $stride i32) (param $top i32) (param $left i32)
    (param $lastDy i32) (param $lastDx i32) (param $width i32)
    (local $r i32) (local $p i32) (local $oy i32) (local $ox i32) (local $iy i32) (local $ix i32) (local $inside i32)
    (local $at i32) (local $entry i32) (local $end i32) (local $from i32) (local $step i32)
    (local.set $step (i32.shl (local.get $width) (i32.const 2)))
    (local.set $to (i32.add (local.get $to) (i32.mul (i32.mul (local.get $job) (local.get $step)) (local.get $k))))
    (local.set $first (i32.add (local.get $first) (i32.mul (local.get $job) (local.get $width))))
    (local.set $end (i32.add (local.get $table) (i32.mul (local.get $k) (i32.const 12))))

    ;; Eight or six neighbours on one row of a planar picture with no padding in sight: vector copies.
    (local.set $oy (i32.div_u (local.get $first) (local.get $outWidth)))
    (local.set $ox (i32.rem_u (local.get $first) (local.get $outWidth)))
    (local.set $iy (i32.sub (i32.mul (local.get $oy) (local.get $stride)) (local.get $top)))
    (local.set $ix (i32.sub (i32.mul (local.get $ox) (local.get $stride)) (local.get $left)))
    (local.set $inside (i32.and
      (i32.and (i32.eq (local.get $stride) (i32.const 1)) (i32.eq (local.get $pixelBytes) (i32.const 4)))
      (i32.and
        (i32.and (i32.ge_s (local.get $iy) (i32.const 0)) (i32.ge_s (local.get $ix) (i32.const 0)))
        (i32.and
          (i32.and
            (i32.le_s (i32.add (local.get $ox) (local.get $width)) (local.get $outWidth))
            (i32.le_s (i32.add (local.get $first) (local.get $width)) (local.get $pixels)))
          (i32.and
            (i32.lt_s (i32.add (local.get $iy) (local.get $lastDy)) (local.get $height))
            (i32.le_s (i32.add (i32.add (local.get $ix) (local.get $lastDx)) (local.get $width)) (local.get $width_)))))))
    (if (local.get $inside)
      (then
        (local.set $from
          (i32.add (local.get $x)
            (i32.add (i32.mul (local.get $iy) (local.get $rowBytes)) (i32.shl (local.get $ix) (i32.const 2)))))
        (local.set $p (i32.sub (local.get $step) (i32.const 16)))
        (loop $rows
          (local.set $at (i32.add (local.get $from) (i32.load offset=8 (local.get $table))))
          (v128.store (local.get $to) (v128.load (local.get $at)))
          (v128.store (i32.add (local.get $to) (local.get $p)) (v128.load (i32.add (local.get $at) (local.get $p))))
          (local.set $to (i32.add (local.get $to) (local.get $step)))
          (local.set $table (i32.add (local.get $table) (i32.const 12)))
          (br_if $rows (i32.lt_u (local.get $table) (local.get $end))))
        (return)))

    (loop $each
      (local.set $p (i32.add (local.get $first) (local.get $r)))
      (local.set $iy
        (i32.sub (i32.mul (i32.div_u (local.get $p) (local.get $outWidth)) (local.get $stride)) (local.get $top)))
      (local.set $ix
        (i32.sub (i32.mul (i32.rem_u (local.get $p) (local.get $outWidth)) (local.get $stride)) (local.get $left)))
      ;; A pixel past the end sees nothing but padding.
      (if (i32.ge_s (local.get $p) (local.get $pixels)) (then (local.set $iy (i32.const 0x40000000))))
      (local.set $from
        (i32.add (local.get $x)
          (i32.add (i32.mul (local.get $iy) (local.get $rowBytes)) (i32.mul (local.get $ix) (local.get $pixelBytes)))))
      (local.set $at (i32.add (local.get $to) (i32.shl (local.get $r) (i32.const 2))))
      (local.set $entry (local.get $table))
      (loop $column
        (f32.store (local.get $at)
          (if (result f32)
            ;; Unsigned comparison: a negative coordinate is a large one.
            (i32.and
              (i32.lt_u (i32.add (local.get $iy) (i32.load (local.get $entry))) (local.get $height))
              (i32.lt_u (i32.add (local.get $ix) (i32.load offset=4 (local.get $entry))) (local.get $width_)))
            (then (f32.load (i32.add (local.get $from) (i32.load offset=8 (local.get $entry)))))
            (else (f32.const 0))))
        (local.set $at (i32.add (local.get $at) (local.get $step)))
        (local.set $entry (i32.add (local.get $entry) (i32.const 12)))
        (br_if $column (i32.lt_u (local.get $entry) (local.get $end))))
      (local.set $r (i32.add (local.get $r) (i32.const 1)))
      (br_if $each (i32.lt_s (local.get $r) (local.get $width)))))
)
