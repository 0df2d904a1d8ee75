;; Matrix products on packed panels: out = alpha * a @ b^T + addend, in f32.
;;
;; `pack` copies `width` rows of a matrix into a panel [k][width], so that the inner loop reads memory in order. Rows
;; of `a` are packed 6 wide, rows of `b` 8 wide: 6x8 accumulators plus two vectors of `b` and one of `a` are exactly
;; the 15 vector registers that V8 allocates on x86-64. `multiply` computes one block of `out` per job.
(module
  (import "env" "memory" (memory 1 65536 shared))
  ;; 4 KiB that belong to the running thread alone.
  (import "env" "scratch" (global $scratch i32))

  ;; Element at $at as f32; a bf16 is the upper half of an f32.
  (func $one (param $at i32) (param $bf16 i32) (result f32)
    (if (result f32) (local.get $bf16)
      (then (f32.reinterpret_i32 (i32.shl (i32.load16_u (local.get $at)) (i32.const 16))))
      (else (f32.load (local.get $at)))))

  ;; Four consecutive elements from $at on, as f32.
  (func $four (param $at i32) (param $bf16 i32) (result v128)
    (if (result v128) (local.get $bf16)
      (then (i32x4.shl (v128.load16x4_u (local.get $at)) (i32.const 16)))
      (else (v128.load (local.get $at)))))

  ;; Packs panel $job: rows $job * $width ... of a [$rows, $k] matrix with strides in elements; zeros past the end.
  (func (export "pack") (param $job i32) (param $to i32) (param $from i32) (param $rows i32) (param $k i32)
    (param $rowStride i32) (param $kStride i32) (param $width i32) (param $bf16 i32)
    (local $bytes i32) (local $step i32) (local $i i32) (local $r i32) (local $at i32) (local $group i32)
    (local $v0 v128) (local $v1 v128) (local $v2 v128) (local $v3 v128)
    (local $t0 v128) (local $t1 v128) (local $t2 v128) (local $t3 v128)
    (local.set $bytes (i32.sub (i32.const 4) (i32.shl (local.get $bf16) (i32.const 1))))
    (local.set $rowStride (i32.mul (local.get $rowStride) (local.get $bytes)))
    (local.set $kStride (i32.mul (local.get $kStride) (local.get $bytes)))
    (local.set $rows (i32.sub (local.get $rows) (i32.mul (local.get $job) (local.get $width))))
    (local.set $from
      (i32.add (local.get $from) (i32.mul (i32.mul (local.get $job) (local.get $width)) (local.get $rowStride))))
    (local.set $step (i32.shl (local.get $width) (i32.const 2)))
    (local.set $to (i32.add (local.get $to) (i32.mul (i32.mul (local.get $job) (local.get $step)) (local.get $k))))

    (if (i32.ge_s (local.get $rows) (local.get $width))
      (then
        ;; A full panel: two groups of four rows, the second one overlapping the first where the panel is 6 wide.
        (if (i32.eq (local.get $kStride) (local.get $bytes))
          (then
            (loop $groups
              (local.set $i (i32.const 0))
              (block $done
                (loop $quads
                  (br_if $done (i32.gt_s (i32.add (local.get $i) (i32.const 4)) (local.get $k)))
                  ;; Rows of $k lie densely: transpose 4x4.
                  (local.set $at (i32.add (i32.add (local.get $from) (i32.mul (local.get $i) (local.get $bytes)))
                    (i32.mul (local.get $group) (local.get $rowStride))))
                  (local.set $v0 (call $four (local.get $at) (local.get $bf16)))
                  (local.set $at (i32.add (local.get $at) (local.get $rowStride)))
                  (local.set $v1 (call $four (local.get $at) (local.get $bf16)))
                  (local.set $at (i32.add (local.get $at) (local.get $rowStride)))
                  (local.set $v2 (call $four (local.get $at) (local.get $bf16)))
                  (local.set $at (i32.add (local.get $at) (local.get $rowStride)))
                  (local.set $v3 (call $four (local.get $at) (local.get $bf16)))
                  (local.set $t0 (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $v0) (local.get $v1)))
                  (local.set $t1 (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $v0) (local.get $v1)))
                  (local.set $t2 (i8x16.shuffle 0 1 2 3 16 17 18 19 4 5 6 7 20 21 22 23 (local.get $v2) (local.get $v3)))
                  (local.set $t3 (i8x16.shuffle 8 9 10 11 24 25 26 27 12 13 14 15 28 29 30 31 (local.get $v2) (local.get $v3)))
                  (local.set $at (i32.add (i32.add (local.get $to) (i32.mul (local.get $i) (local.get $step)))
                    (i32.shl (local.get $group) (i32.const 2))))
                  (v128.store (local.get $at)
                    (i8x16.shuffle 0 1 2 3 4 5 6 7 16 17 18 19 20 21 22 23 (local.get $t0) (local.get $t2)))
                  (local.set $at (i32.add (local.get $at) (local.get $step)))
                  (v128.store (local.get $at)
                    (i8x16.shuffle 8 9 10 11 12 13 14 15 24 25 26 27 28 29 30 31 (local.get $t0) (local.get $t2)))
                  (local.set $at (i32.add (local.get $at) (local.get $step)))
                  (v128.store (local.get $at)
                    (i8x16.shuffle 0 1 2 3 4 5 6 7 16 17 18 19 20 21 22 23 (local.get $t1) (local.get $t3)))
                  (local.set $at (i32.add (local.get $at) (local.get $step)))
                  (v128.store (local.get $at)
                    (i8x16.shuffle 8 9 10 11 12 13 14 15 24 25 26 27 28 29 30 31 (local.get $t1) (local.get $t3)))
                  (local.set $i (i32.add (local.get $i) (i32.const 4)))
                  (br $quads)))
              (if (i32.eqz (local.get $group))
                (then
                  (local.set $group (i32.sub (local.get $width) (i32.const 4)))
                  (br $groups)))))
          (else
            (if (i32.eq (local.get $rowStride) (local.get $bytes))
              (then
                ;; The rows' elements lie side by side: copy.
                (block $done
                  (loop $copies
                    (br_if $done (i32.ge_s (local.get $i) (local.get $k)))
                    (local.set $at (i32.add (local.get $from) (i32.mul (local.get $i) (local.get $kStride))))
                    (local.set $v0 (call $four (local.get $at) (local.get $bf16)))
                    (local.set $group (i32.sub (local.get $width) (i32.const 4)))
                    (local.set $v1
                      (call $four (i32.add (local.get $at) (i32.mul (local.get $group) (local.get $bytes))) (local.get $bf16)))
                    (local.set $at (i32.add (local.get $to) (i32.mul (local.get $i) (local.get $step))))
                    (v128.store (local.get $at) (local.get $v0))
                    (v128.store (i32.add (local.get $at) (i32.shl (local.get $group) (i32.const 2))) (local.get $v1))
                    (local.set $i (i32.add (local.get $i) (i32.const 1)))
                    (br $copies)))))))))

    ;; What is left (the end of $k, a last panel that is not full, odd strides), one element at a time.
    (block $done
      (loop $columns
        (br_if $done (i32.ge_s (local.get $i) (local.get $k)))
        (local.set $at (i32.add (local.get $to) (i32.mul (local.get $i) (local.get $step))))
        (local.set $r (i32.const 0))
        (loop $each
          (f32.store (local.get $at)
            (if (result f32) (i32.lt_s (local.get $r) (local.get $rows))
              (then
                (call $one
                  (i32.add (local.get $from)
                    (i32.add (i32.mul (local.get $r) (local.get $rowStride)) (i32.mul (local.get $i) (local.get $kStride))))
                  (local.get $bf16)))
              (else (f32.const 0))))
          (local.set $at (i32.add (local.get $at) (i32.const 4)))
          (local.set $r (i32.add (local.get $r) (i32.const 1)))
          (br_if $each (i32.lt_s (local.get $r) (local.get $width))))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br $columns))))

  ;; One 6x8 tile, $k deep: out = alpha * a @ b^T + addend, $rows x $cols of it stored. Row strides in bytes.
  (func $tile (param $a i32) (param $b i32) (param $k i32) (param $out i32) (param $outRow i32)
    (param $add i32) (param $addRow i32) (param $rows i32) (param $cols i32) (param $alpha f32)
    (local $x v128) (local $b0 v128) (local $b1 v128) (local $i i32) (local $at i32)
    (local $c00 v128) (local $c01 v128) (local $c10 v128) (local $c11 v128) (local $c20 v128) (local $c21 v128)
    (local $c30 v128) (local $c31 v128) (local $c40 v128) (local $c41 v128) (local $c50 v128) (local $c51 v128)
    (loop $depth
      (local.set $b0 (v128.load (local.get $b)))
      (local.set $b1 (v128.load offset=16 (local.get $b)))
      (local.set $x (v128.load32_splat (local.get $a)))
      local.get $x local.get $b0 local.get $c00 f32x4.relaxed_madd local.set $c00
      local.get $x local.get $b1 local.get $c01 f32x4.relaxed_madd local.set $c01
      (local.set $x (v128.load32_splat offset=4 (local.get $a)))
      local.get $x local.get $b0 local.get $c10 f32x4.relaxed_madd local.set $c10
      local.get $x local.get $b1 local.get $c11 f32x4.relaxed_madd local.set $c11
      (local.set $x (v128.load32_splat offset=8 (local.get $a)))
      local.get $x local.get $b0 local.get $c20 f32x4.relaxed_madd local.set $c20
      local.get $x local.get $b1 local.get $c21 f32x4.relaxed_madd local.set $c21
      (local.set $x (v128.load32_splat offset=12 (local.get $a)))
      local.get $x local.get $b0 local.get $c30 f32x4.relaxed_madd local.set $c30
      local.get $x local.get $b1 local.get $c31 f32x4.relaxed_madd local.set $c31
      (local.set $x (v128.load32_splat offset=16 (local.get $a)))
      local.get $x local.get $b0 local.get $c40 f32x4.relaxed_madd local.set $c40
      local.get $x local.get $b1 local.get $c41 f32x4.relaxed_madd local.set $c41
      (local.set $x (v128.load32_splat offset=20 (local.get $a)))
      local.get $x local.get $b0 local.get $c50 f32x4.relaxed_madd local.set $c50
      local.get $x local.get $b1 local.get $c51 f32x4.relaxed_madd local.set $c51
      (local.set $a (i32.add (local.get $a) (i32.const 24)))
      (local.set $b (i32.add (local.get $b) (i32.const 32)))
      (br_if $depth (local.tee $k (i32.sub (local.get $k) (i32.const 1)))))

    (local.set $x (f32x4.splat (local.get $alpha)))
    (if (i32.and (i32.eq (local.get $rows) (i32.const 6)) (i32.eq (local.get $cols) (i32.const 8)))
      (then
        (v128.store (local.get $out) (f32x4.add (f32x4.mul (local.get $c00) (local.get $x)) (v128.load (local.get $add))))
        (v128.store offset=16 (local.get $out) (f32x4.add (f32x4.mul (local.get $c01) (local.get $x)) (v128.load offset=16 (local.get $add))))
        (local.set $out (i32.add (local.get $out) (local.get $outRow)))
        (local.set $add (i32.add (local.get $add) (local.get $addRow)))
        (v128.store (local.get $out) (f32x4.add (f32x4.mul (local.get $c10) (local.get $x)) (v128.load (local.get $add))))
        (v128.store offset=16 (local.get $out) (f32x4.add (f32x4.mul (local.get $c11) (local.get $x)) (v128.load offset=16 (local.get $add))))
        (local.set $out (i32.add (local.get $out) (local.get $outRow)))
        (local.set $add (i32.add (local.get $add) (local.get $addRow)))
        (v128.store (local.get $out) (f32x4.add (f32x4.mul (local.get $c20) (local.get $x)) (v128.load (local.get $add))))
        (v128.store offset=16 (local.get $out) (f32x4.add (f32x4.mul (local.get $c21) (local.get $x)) (v128.load offset=16 (local.get $add))))
        (local.set $out (i32.add (local.get $out) (local.get $outRow)))
        (local.set $add (i32.add (local.get $add) (local.get $addRow)))
        (v128.store (local.get $out) (f32x4.add (f32x4.mul (local.get $c30) (local.get $x)) (v128.load (local.get $add))))
        (v128.store offset=16 (local.get $out) (f32x4.add (f32x4.mul (local.get $c31) (local.get $x)) (v128.load offset=16 (local.get $add))))
        (local.set $out (i32.add (local.get $out) (local.get $outRow)))
        (local.set $add (i32.add (local.get $add) (local.get $addRow)))
        (v128.store (local.get $out) (f32x4.add (f32x4.mul (local.get $c40) (local.get $x)) (v128.load (local.get $add))))
        (v128.store offset=16 (local.get $out) (f32x4.add (f32x4.mul (local.get $c41) (local.get $x)) (v128.load offset=16 (local.get $add))))
        (local.set $out (i32.add (local.get $out) (local.get $outRow)))
        (local.set $add (i32.add (local.get $add) (local.get $addRow)))
        (v128.store (local.get $out) (f32x4.add (f32x4.mul (local.get $c50) (local.get $x)) (v128.load (local.get $add))))
        (v128.store offset=16 (local.get $out) (f32x4.add (f32x4.mul (local.get $c51) (local.get $x)) (v128.load offset=16 (local.get $add))))
        (return)))

    ;; A tile at the edge: by way of the thread's scratch, so that nothing outside `out` is touched.
    (v128.store (global.get $scratch) (local.get $c00))
    (v128.store offset=16 (global.get $scratch) (local.get $c01))
    (v128.store offset=32 (global.get $scratch) (local.get $c10))
    (v128.store offset=48 (global.get $scratch) (local.get $c11))
    (v128.store offset=64 (global.get $scratch) (local.get $c20))
    (v128.store offset=80 (global.get $scratch) (local.get $c21))
    (v128.store offset=96 (global.get $scratch) (local.get $c30))
    (v128.store offset=112 (global.get $scratch) (local.get $c31))
    (v128.store offset=128 (global.get $scratch) (local.get $c40))
    (v128.store offset=144 (global.get $scratch) (local.get $c41))
    (v128.store offset=160 (global.get $scratch) (local.get $c50))
    (v128.store offset=176 (global.get $scratch) (local.get $c51))
    (local.set $b (global.get $scratch))
    (loop $row
      (local.set $i (i32.const 0))
      (loop $column
        (local.set $at (i32.shl (local.get $i) (i32.const 2)))
        (f32.store (i32.add (local.get $out) (local.get $at))
          (f32.add
            (f32.mul (f32.load (i32.add (local.get $b) (local.get $at))) (local.get $alpha))
            (f32.load (i32.add (local.get $add) (local.get $at)))))
        (local.set $i (i32.add (local.get $i) (i32.const 1)))
        (br_if $column (i32.lt_s (local.get $i) (local.get $cols))))
      (local.set $b (i32.add (local.get $b) (i32.const 32)))
      (local.set $out (i32.add (local.get $out) (local.get $outRow)))
      (local.set $add (i32.add (local.get $add) (local.get $addRow)))
      (br_if $row (local.tee $rows (i32.sub (local.get $rows) (i32.const 1))))))

  ;; Block $job of out [$m, $n]: $mBlock panels of `a` by $nBlock panels of `b`; blocks are numbered down the columns.
  ;; The addend of element (i, j) lies at $add + i * $addRow + floor(j / 8) * $addPanel + (j mod 8) * 4 (in bytes).
  (func (export "multiply") (param $job i32) (param $a i32) (param $b i32) (param $out i32)
    (param $m i32) (param $n i32) (param $k i32) (param $outRow i32)
    (param $add i32) (param $addRow i32) (param $addPanel i32) (param $alpha f32)
    (param $mBlock i32) (param $nBlock i32)
    (local $mBlocks i32) (local $iStart i32) (local $iEnd i32) (local $jEnd i32) (local $jStart i32)
    (local $i i32) (local $j i32) (local $k0 i32) (local $depth i32) (local $rows i32) (local $cols i32) (local $at i32)
    (local.set $mBlocks
      (i32.div_u
        (i32.add (local.get $m) (i32.sub (i32.mul (local.get $mBlock) (i32.const 6)) (i32.const 1)))
        (i32.mul (local.get $mBlock) (i32.const 6))))
    (local.set $iStart (i32.mul (i32.rem_u (local.get $job) (local.get $mBlocks)) (i32.mul (local.get $mBlock) (i32.const 6))))
    (local.set $jStart (i32.mul (i32.div_u (local.get $job) (local.get $mBlocks)) (i32.mul (local.get $nBlock) (i32.const 8))))
    (local.set $iEnd (i32.add (local.get $iStart) (i32.mul (local.get $mBlock) (i32.const 6))))
    (if (i32.gt_s (local.get $iEnd) (local.get $m)) (then (local.set $iEnd (local.get $m))))
    (local.set $jEnd (i32.add (local.get $jStart) (i32.mul (local.get $nBlock) (i32.const 8))))
    (if (i32.gt_s (local.get $jEnd) (local.get $n)) (then (local.set $jEnd (local.get $n))))
    ;; 256 deep slices: a slice of a `b` panel (8 KiB) stays in the first-level cache while all of `a` passes.
    (loop $slices
      (local.set $depth (i32.sub (local.get $k) (local.get $k0)))
      (if (i32.gt_s (local.get $depth) (i32.const 256)) (then (local.set $depth (i32.const 256))))
      (local.set $j (local.get $jStart))
      (loop $columns
        (local.set $cols (i32.sub (local.get $n) (local.get $j)))
        (if (i32.gt_s (local.get $cols) (i32.const 8)) (then (local.set $cols (i32.const 8))))
        (local.set $i (local.get $iStart))
        (loop $panels
          (local.set $rows (i32.sub (local.get $m) (local.get $i)))
          (if (i32.gt_s (local.get $rows) (i32.const 6)) (then (local.set $rows (i32.const 6))))
          (local.set $at
            (i32.add (local.get $out)
              (i32.add (i32.mul (local.get $i) (local.get $outRow)) (i32.shl (local.get $j) (i32.const 2)))))
          (if (i32.and (i32.eq (local.get $rows) (i32.const 6)) (i32.eq (local.get $cols) (i32.const 8)))
            (then
              (call $tile
                (i32.add (local.get $a)
                  (i32.mul
                    (i32.add (i32.mul (i32.div_u (local.get $i) (i32.const 6)) (local.get $k)) (local.get $k0))
                    (i32.const 24)))
                (i32.add (local.get $b)
                  (i32.shl
                    (i32.add (i32.mul (i32.shr_u (local.get $j) (i32.const 3)) (local.get $k)) (local.get $k0))
                    (i32.const 5)))
                (local.get $depth) (local.get $at) (local.get $outRow)
                ;; The first slice starts from the addend, the others go on from what is there.
                (select
                  (local.get $at)
                  (i32.add (local.get $add)
                    (i32.add
                      (i32.mul (local.get $i) (local.get $addRow))
                      (i32.mul (i32.shr_u (local.get $j) (i32.const 3)) (local.get $addPanel))))
                  (local.get $k0))
                (select (local.get $outRow) (local.get $addRow) (local.get $k0))
                (local.get $rows) (local.get $cols) (local.get $alpha)))
            (else
              ;; Tiles at the edge take all of k at once.
              (if (i32.eqz (local.get $k0))
                (then
                  (call $tile
                    (i32.add (local.get $a)
                      (i32.mul (i32.mul (i32.div_u (local.get $i) (i32.const 6)) (local.get $k)) (i32.const 24)))
                    (i32.add (local.get $b)
                      (i32.shl (i32.mul (i32.shr_u (local.get $j) (i32.const 3)) (local.get $k)) (i32.const 5)))
                    (local.get $k) (local.get $at) (local.get $outRow)
                    (i32.add (local.get $add)
                      (i32.add
                        (i32.mul (local.get $i) (local.get $addRow))
                        (i32.mul (i32.shr_u (local.get $j) (i32.const 3)) (local.get $addPanel))))
                    (local.get $addRow)
                    (local.get $rows) (local.get $cols) (local.get $alpha))))))
          (local.set $i (i32.add (local.get $i) (i32.const 6)))
          (br_if $panels (i32.lt_s (local.get $i) (local.get $iEnd))))
        (local.set $j (i32.add (local.get $j) (i32.const 8)))
        (br_if $columns (i32.lt_s (local.get $j) (local.get $jEnd))))
      (local.set $k0 (i32.add (local.get $k0) (i32.const 256)))
      (br_if $slices (i32.lt_s (local.get $k0) (local.get $k)))))
)
